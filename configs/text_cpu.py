"""A small byte model on a megabyte of your own text: minutes on two CPU cores.

Command:   perceiver-ar train --config=text_cpu --workdir=run --config.data.source=own.txt
Hardware:  2 CPU cores
Expected:  1.70 nats per byte (2.45 bits) on the held-out end of three books of 0.99 MB, after 573
           seconds of CPU time in all; docs/own_text.md has the run
"""

from perceiver_ar_jax.run_config import default_config


def get_config():
    config = default_config()
    config.steps = 1000
    config.batch_size = 8
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 250

    config.model.max_seq_len = 512
    config.model.max_latents = 256
    config.model.num_channels = 192
    config.model.num_heads = 3
    config.model.num_self_attention_layers = 4
    config.model.num_self_attention_rotary_layers = -1
    config.model.cross_attention_dropout = 0.0
    config.model.abs_pos_emb = False
    config.model.output_norm = True
    config.model.output_bias = False

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.min_fraction = 0.0
    config.optimizer.b2 = 0.98

    config.data.tokenizer = "bytes"
    config.data.num_workers = 0
    config.sample.max_new_tokens = 200
    return config
