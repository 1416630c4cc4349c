"""A small byte model that reads prefixes of a million bytes, on one machine without an accelerator.

Command:   python train.py --config=configs/long_cpu.py --config.data.source='books/*.txt'
Hardware:  any CPU; a step reads 2**20 bytes and trains 512 of them
Memory:    docs/long_context.md has what a step of this shape takes
Expected:  not a model to use, but a way to see a long prefix work; the loss falls from 5.6 nats

The prefix is streamed, `prefix_chunk` positions at a time. Shorter prefixes are faster by as much:
--config.model.max_seq_len=131584 is a prefix of 2**17.
"""

from perceiver_ar_jax.run_config import default_config


def get_config():
    config = default_config()
    config.steps = 100
    config.batch_size = 1
    config.log_every = 1
    config.eval_every = 100
    config.checkpoint_every = 10

    config.model.max_seq_len = 2**20
    config.model.max_latents = 512
    config.model.prefix_chunk = 1024
    config.model.num_channels = 256
    config.model.num_heads = 8
    config.model.num_self_attention_layers = 4
    config.model.abs_pos_emb = False  # a table of a million positions would be most of the model
    config.model.cross_attention_dropout = 0.0

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10

    config.data.tokenizer = "bytes"
    config.data.min_seq_len = 2**19
    config.data.num_workers = 0
    config.sample.max_new_tokens = 32
    return config
