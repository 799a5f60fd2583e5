"""Step caches: spare BACK on steps that hardly change."""
