"""The 30.6M model on UTF-8 bytes: the shape of perceiver-io's WikiText-103 run.

Command:   python train.py --config=configs/bytes_small.py --workdir=runs/bytes_small \\
             --config.data.source='wikitext-103/wiki.train*.txt'
Hardware:  one GPU or a few TPU chips
Memory:    5.5 GiB per chip on 4 v5e with 24 windows each, by tools/compile_ahead.py --quick
Expected:  0.876 nats per byte (1.264 bits) on WikiText-103 is perceiver-io's published figure;
           not yet repeated here
Prompts:   training never sees less than 4096 tokens of context (min_seq_len, as in the reference),
           so short prompts come out badly; --config.data.min_seq_len=512, the number of latents,
           costs nothing in evaluation and mends that (docs/training.md)
"""

from perceiver_ar_jax.run_config import default_config


def get_config():
    config = default_config()
    config.steps = 50_000
    config.batch_size = 96
    config.model.cross_attention_dropout = 0.5

    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.5

    config.data.tokenizer = "bytes"
    config.data.min_seq_len = 4096
    config.data.num_workers = 1

    config.sample.max_new_tokens = 256
    config.sample.num_latents = 4
    config.sample.prompt = " The history of "
    return config
