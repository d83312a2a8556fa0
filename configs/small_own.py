"""Fine-tune weights on a small set of your own, 50 to 5,000 people (docs/first_model.md).

    python scripts/train.py configs/small_own.py --init-from backbone.pth --model.network r50 \
        --data.path FOLDER --evaluation.targets own.bin --workdir runs/own

For one GPU; `arcface-jax plan small_own --devices 1 --num-classes 5000` prints the memory. On CPUs,
freeze all but the last layers (`--finetune.frozen`). Expect a gain if the faces differ from the
training data of the weights, and none otherwise. Measured, on two cores of an AMD EPYC:
MobileFaceNet y1 as published has an accuracy of 0.994 on 1,000 pairs of 32 people of Labeled Faces
in the Wild, and of 0.815 where their faces are shrunk to 16 pixels. The gain from training there
was not measured; r_tiny with random weights goes from 0.675 to 0.848 on 400 pairs of synthetic
faces, trained on 240 faces of 24 people.
"""

from arcface_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        data=c.DataConfig(global_batch_size=64),
        model=c.ModelConfig(network="r50", dtype="float32", bn_batch_size=64),
        # A few hundred classes are easy to separate: half the usual scale and a small margin.
        head=c.HeadConfig(loss="cosface", margin=0.2, scale=32.0, dtype="float32"),
        optimizer=c.OptimizerConfig(learning_rate=0.05, weight_decay=5e-4),
        schedule=c.ScheduleConfig(epochs=5, warmup_epochs=0.5),
        # The centers learn at the full rate, the network at a tenth; its statistics, which come
        # from many more people, are frozen.
        finetune=c.FineTuneConfig(
            centers="class_means", frozen_statistics=("*",), rates=(("*", 0.1),)
        ),
        evaluation=c.EvaluationConfig(every_epochs=2),
    )
