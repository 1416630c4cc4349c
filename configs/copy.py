"""The copy task: random bytes, then the same bytes mirrored; nothing but the copy is predicted.

Command:   python train.py --config=configs/copy.py:32
             :128, :4096 or any even number of positions; the paper has 131072
             --config.data.source=repeat:128 copies the bytes in their order
             --config.model.abs_pos_emb=false leaves rotary positions alone
Hardware:  one CPU core up to :128
Expected:  every token right after 200 steps (:32) and 400 steps (:128), 30 and 42 CPU seconds;
           docs/what_the_prefix_buys.md has what other lengths and positions give

Up to 1024 positions the latents are the whole copy and the prefix exactly the bytes to be copied.
Above, 512 latents stand anywhere in the copy: windows end at a place drawn at random.

Source: arXiv 2202.07765, section 5.1.1.
"""

from perceiver_ar_jax.run_config import default_config


def get_config(positions: str = "32"):
    positions = int(positions)
    half = positions // 2
    num_latents = min(half, 512)
    config = default_config()
    config.steps = 400
    config.batch_size = max(4, 2048 // positions)
    config.log_every = 50
    config.eval_every = 100
    config.checkpoint_every = 100

    config.model.max_seq_len = positions
    config.model.max_latents = num_latents
    config.model.num_channels = 128
    config.model.num_heads = 1
    config.model.num_self_attention_layers = 1
    config.model.cross_attention_dropout = 0.0
    config.model.output_norm = True

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0

    config.data.source = f"mirror:{positions}"
    config.data.min_seq_len = half + num_latents  # all latents are copy
    config.data.num_workers = 0

    letters = "abcdefghijklmnopqrstuvwxyz" * -(-half // 26)
    config.sample.prompt = letters[:half] + letters[half - 1]  # the copy has begun
    config.sample.max_new_tokens = min(half - 1, 64)
    config.sample.top_k = 1
    return config
