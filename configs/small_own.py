"""Fine-tune given weights on a small set of one's own: 50 to 5,000 people (docs/first_model.md).

    python scripts/train.py configs/small_own.py --init-from backbone.pth --model.network r50 \
        --data.path FOLDER --evaluation.targets own.bin --workdir runs/own

One GPU with 16 GB of memory is meant to be enough for r50. Without one, on CPU cores, freeze all
but the last layers (`--finetune.frozen`). What to expect: a gain where the faces differ from those that the weights were
trained on, and none where they do not. Measured on two cores of an AMD EPYC: of 158 people of Labeled
Faces in the Wild, MobileFaceNet y1 as published verifies 1,000 pairs of 32 with 0.994, and with 0.815
where the faces are shrunk to 16 pixels. Training itself was measured on no such set yet.
"""

from arcface_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        data=c.DataConfig(global_batch_size=64),
        model=c.ModelConfig(network="r50", dtype="float32", bn_batch_size=64),
        # A few hundred classes are told apart easily: half the usual scale and a small margin.
        head=c.HeadConfig(loss="cosface", margin=0.2, scale=32.0, dtype="float32"),
        optimizer=c.OptimizerConfig(learning_rate=0.05, weight_decay=5e-4),
        schedule=c.ScheduleConfig(epochs=5, warmup_epochs=0.5),
        # The centers learn at the full rate, the network at a tenth; its statistics, which come from
        # many more people, stay as they are.
        finetune=c.FineTuneConfig(
            centers="class_means", frozen_statistics=("*",), rates=(("*", 0.1),)
        ),
        evaluation=c.EvaluationConfig(every_epochs=2),
    )
