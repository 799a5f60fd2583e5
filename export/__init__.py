"""Model families, the front/back split, graphs from diffusers modules, layer calibration."""
