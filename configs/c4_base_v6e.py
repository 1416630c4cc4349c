"""c4_base's shape with heads as wide as v6e's matrix units: another model, with heads of its own.

Command:   python train.py --config=configs/c4_base_v6e.py --workdir=gs://BUCKET/c4_base_v6e
             with data and tokenizer as for c4_base
Hardware:  64 TPU v6e chips
Memory:    7.5 GiB per chip, by tools/compile_ahead.py --topology=v6e:8x8
Expected:  not yet run; no figure is published for it

As c4_base, but 5 heads of 256 channels instead of 10 of 128: as many parameters, other weights, so
it starts from scratch and nothing that was converted fits. Matrix units of v6e are 256 wide, twice
those of earlier TPUs, so that heads of 128 leave half of one idle inside the attention kernels:
these take 6.5 instead of 8.1 ms of the step by tools/compile_kernels.py, and the rest takes as long
as in c4_base. Four microbatches: with all rows at once, the step takes a third longer
(docs/performance.md).
"""

from perceiver_ar_jax.presets import preset


def get_config():
    config = preset("c4_base")
    config.model.num_heads = 5
    config.microbatches = 4
    return config
