"""A converted or trained model learns your text, on one device.

Command:   perceiver-ar train --config=finetune:BASE --workdir=tuned \\
             --config.data.source='mine/*.txt'
             BASE: what `perceiver-ar convert` wrote, or the workdir of a run
Hardware:  one GPU or TPU chip, or a CPU with patience
Memory:    16 bytes per parameter (weights, gradients, AdamW's moments), 6.8 GiB for the 455M model,
           and activations; a run says at its start what its step takes

Model, tokenizer and first weights are BASE's. With less memory:
--config.microbatches=8 --config.model.remat=full; on a CPU: --config.model.dtype=float32.
"""

from perceiver_ar_jax.pretrained import model_of
from perceiver_ar_jax.run_config import default_config, model_settings


def get_config(base: str):
    config = default_config()
    config.steps = 1000
    config.batch_size = 8
    config.log_every = 10
    config.eval_every = 100
    config.checkpoint_every = 200

    model, tokenizer = model_of(base)
    computed = {"dtype": "bfloat16", "remat": "names", "scan_layers": True}
    config.model.update(model_settings(model.replace(rotary_inv_freq=None)) | computed)
    config.init_from = base
    config.data.tokenizer = tokenizer or ""  # none in BASE: for a flag to name

    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 100
    return config
