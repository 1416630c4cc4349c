"""A few minutes on a CPU: a small Perceiver AR learns the English of documentation.

Command:   make quickstart
Hardware:  2 CPU cores
"""

from perceiver_ar_jax.processor import fastest_dtype
from perceiver_ar_jax.run_config import default_config


def get_config():
    config = default_config()
    config.steps = 1000
    config.batch_size = 4
    config.log_every = 20
    config.eval_every = 250
    config.checkpoint_every = 250

    config.model.vocab_size = 4096
    config.model.max_seq_len = 512
    config.model.max_latents = 256
    config.model.num_channels = 256
    config.model.num_heads = 2
    config.model.num_self_attention_layers = 4
    config.model.num_self_attention_rotary_layers = -1
    config.model.cross_attention_dropout = 0.0
    config.model.abs_pos_emb = False
    config.model.output_norm = True
    config.model.output_bias = False
    config.model.dtype = fastest_dtype()

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.min_fraction = 0.0
    config.optimizer.b2 = 0.98

    config.data.source = "runs/quickstart/data/python_docs/en/2.0.0"
    config.data.tokenizer = "runs/quickstart/data/tokenizer.model"
    config.data.min_seq_len = 384
    config.data.num_workers = 0

    config.sample.prompt = "By default, all elements are"
    config.sample.num_latents = 8
    config.sample.temperature = 0.5
    return config
