"""Images from a model.

From outside: `sampler` (Sampler, Generated), `request` (GenerationRequest, resolve), `files` (read_facts, png,
save_numbered) and `upscale` (check_network, tiles_cost).
"""
