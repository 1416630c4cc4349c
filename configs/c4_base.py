"""The 455M model on C4: perceiver-io's run (krasserm/perceiver-ar-clm-base), to the letter.

Command:   python train.py --config=configs/c4_base.py --workdir=gs://BUCKET/c4_base
             with C4 where TFDS puts it ($TFDS_DATA_DIR, otherwise ~/tensorflow_datasets) and the
             [hub] extra for XLNet's tokenizer; otherwise name a directory and a file:
             --config.data.source=gs://BUCKET/tensorflow_datasets/c4/en/3.0.1
             --config.data.tokenizer=spiece.model      (on every host of the pod)
Hardware:  256 TPU chips; fsdp takes up to 16 devices, data parallelism the rest, so that the same
           command starts on 1, 4, 8, 16 or 256. For a box of 8 GPUs: --config.microbatches=4
Memory:    4.2 GiB per chip on 256 v5e, 12.2 on 128 v4, 18.7 on 64 v5p, 30.2 on each of 8 H100, by
           tools/compile_ahead.py; docs/tpu_pods.md and docs/gpu.md have the tables
           (v6e: --config.microbatches=4 is faster, docs/performance.md)
Expected:  validation loss 2.820 nats per token after 50,000 steps (perceiver-io's published
           figure; not yet repeated here)

79e9 tokens are read and 52.4e9 trained on: 2048 windows per step, 512 to 1024 tokens each, the
loss on the last 512 positions.
"""

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.run_config import default_config, model_settings


def get_config():
    config = default_config()
    config.steps = 50_000
    config.batch_size = 2048
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000

    model = PerceiverARConfig.clm_base(dtype="bfloat16", remat="auto")
    config.model.update(model_settings(model))

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.min_fraction = 0.1
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.mesh.data = -1
    config.mesh.fsdp = -1
    config.mesh.max_fsdp = 16

    config.data.source = "c4/en:3.0.1"
    config.data.tokenizer = "xlnet-base-cased"
    config.data.min_seq_len = 512
    config.data.eval_split = "validation[:1%]"
    config.data.num_workers = 1
    return config
