"""The 455M model on C4, trained on every token that it reads.

Command:   python train.py --config=configs/c4_base_every_token.py --workdir=gs://BUCKET/every_token
             with data and tokenizer as for c4_base
Hardware:  as c4_base
Expected:  not yet run; no figure is published for it

As c4_base, but both halves of a window of 1,024 positions are latents: the first 512 read nothing
before them, the other 512 read the first as prefix, as in c4_base. So a step trains twice as many
tokens of the same text. The model and its checkpoints are those of c4_base.
"""

from perceiver_ar_jax.presets import preset


def get_config():
    config = preset("c4_base")
    config.latent_windows = 2
    config.batch_size //= 2  # as many trained tokens per step
    return config
