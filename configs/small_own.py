"""Fine-tune given weights on a set of one's own: 50 to 5,000 people, a few images or more of each.

    python scripts/train.py configs/small_own.py --init-from weights.onnx --data.path FOLDER \
        --evaluation.targets own.bin --workdir runs/own
"""

from arcface_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        data=c.DataConfig(global_batch_size=64),
        model=c.ModelConfig(network="r50", dtype="float32", bn_batch_size=64),
        # Few classes are told apart easily: half the usual scale and a small margin.
        head=c.HeadConfig(loss="cosface", margin=0.2, scale=32.0, dtype="float32"),
        optimizer=c.OptimizerConfig(learning_rate=0.05, weight_decay=5e-4),
        schedule=c.ScheduleConfig(epochs=5, warmup_epochs=0.5),
        finetune=c.FineTuneConfig(
            centers="class_means", frozen_statistics=("*",), rates=(("*", 0.1),)
        ),
        evaluation=c.EvaluationConfig(every_epochs=2),
    )
