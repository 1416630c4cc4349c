"""A model of a few thousand parameters on bytes, for tests.

Command:   python train.py --config=configs/tiny.py --config.data.source=README.md
Hardware:  any CPU
"""

from perceiver_ar_jax.run_config import default_config


def get_config():
    config = default_config()
    config.steps = 20
    config.batch_size = 8
    config.log_every = 5
    config.eval_every = 20
    config.checkpoint_every = 10

    config.model.max_seq_len = 64
    config.model.max_latents = 32
    config.model.num_channels = 32
    config.model.num_heads = 2
    config.model.num_self_attention_layers = 2

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5

    config.data.tokenizer = "bytes"
    config.data.min_seq_len = 48
    config.data.num_workers = 0
    config.sample.max_new_tokens = 16
    return config
