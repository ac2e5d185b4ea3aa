"""Training a text-to-image model on curated shards. A library: it runs without Ray.

data: pictures and their order; model: diffusers pipelines, built or loaded; objective: flow, v and eps; tasks: what a
batch's loss is; loop: the steps; checkpoint: what a run goes on from; latents: computed once; world: several processes.
"""
