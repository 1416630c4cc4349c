"""The 455M model on C4 with a prefix of up to 32,256 tokens, fine-tuned or from scratch.

Command:   python train.py --config=configs/c4_base_long.py --workdir=gs://BUCKET/c4_base_long
             with data and tokenizer as for c4_base
Hardware:  256 TPU chips, one window per chip
Memory:    2.6 GiB per chip on v5e, by tools/compile_ahead.py (docs/tpu_pods.md)
Expected:  not yet run; no figure is published for this length

As c4_base, but windows of 32,768 positions, documents joined until they are full. Half of the
prefix is dropped in training (paper, appendix E.2), which halves the keys of the first layer. To
spread one window over several devices, give the mesh a context axis: --config.mesh.context=8.
"""

from perceiver_ar_jax.presets import preset


def get_config():
    config = preset("c4_base")
    config.batch_size = 256
    config.model.max_seq_len = 32_768
    config.model.cross_attention_dropout = 0.5
    config.data.min_seq_len = 16_384
    return config
