"""Tensors in, tokens out: ranking, coverage, residuals, matching; no request, no step."""
