"""The examples of docs/extending.md: each passes its checker, and all of them train together."""

import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax import config as configs
from arcface_jax import testing
from arcface_jax.commands import train as train_command
from arcface_jax.config import Config, HeadConfig, ModelConfig, OptimizerConfig
from arcface_jax.convert import to_onnx, to_torch
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import UserError
from arcface_jax.heads import margins
from arcface_jax.train import train
from arcface_jax.training.network import Network

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"
IDENTITIES, IMAGES = 6, 4


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current directory of all tests here: the guide's package, and faces as arrays."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code in re.findall(
        r"```python\n# (mypkg/\w+\.py)\n(.*?)```", GUIDE.read_text(), re.S
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    numbers = range(IDENTITIES * IMAGES)
    faces = [draw_face(seed=3, identity=n // IMAGES, index=n % IMAGES) for n in numbers]
    np.save(folder / "images.npy", np.stack(faces))
    np.save(folder / "labels.npy", np.repeat(np.arange(IDENTITIES, dtype=np.int32), IMAGES))
    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    sys.path[:] = path
    for name in [name for name in sys.modules if name.split(".")[0] == "mypkg"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def config(folder) -> Config:
    return configs.replace(
        Config(),
        workdir=str(folder / "run"),
        data__path=f"mypkg.data:open_arrays:{folder}",
        data__global_batch_size=8,
        model__network="mypkg.nets:convnext",
        model__options=(("width", 8), ("depth", 1)),
        model__embedding_size=16,
        model__dtype="float32",
        head__loss="mypkg.losses:mv_softmax",
        head__options=(("t", 0.1),),
        head__margin=0.2,
        optimizer__kind="mypkg.opt:lion",
        optimizer__learning_rate=1e-3,
        schedule__epochs=1,
        evaluation__targets=(f"mypkg.evals:rank1:{folder}",),
        evaluation__batch_size=8,
        checkpoint__best_metric="eval/rank1/accuracy",
        logging__every_steps=1,
        logging__tensorboard=False,
    )


@pytest.fixture(scope="module")
def run(config):
    return train(config)


def test_the_guide_has_a_file_for_each_kind_of_part(folder):
    files = sorted(path.stem for path in (folder / "mypkg").iterdir() if path.suffix)
    assert files == ["data", "elastic", "evals", "faces", "losses", "nets", "opt"]


def test_the_loss_passes_its_checker():
    testing.check_loss("mypkg.losses:mv_softmax", HeadConfig(margin=0.2, scale=16.0))


def test_the_random_loss_passes_its_checker_and_draws_in_each_step():
    head = HeadConfig(loss="mypkg.elastic:elastic_arcface", margin=0.4, options=(("std", 0.1),))
    testing.check_loss(head.loss, head)
    target = margins.make(head).target
    first, second = (
        np.arccos(target(jnp.zeros(5000), jnp.ones(5000), {"step": jnp.float32(step)}))
        for step in (1, 2)
    )
    for drawn in (first - np.pi / 2, second - np.pi / 2):
        assert abs(drawn.mean() - 0.4) < 0.006 and abs(drawn.std() - 0.1) < 0.006
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_the_network_passes_its_checker():
    options = (("width", 8), ("depth", 1))
    model = ModelConfig(embedding_size=16, options=options)
    testing.check_network("mypkg.nets:convnext", model)


def test_the_optimizer_passes_its_checker():
    testing.check_optimizer("mypkg.opt:lion", OptimizerConfig(betas=(0.9, 0.99)))


def test_the_other_parts_pass_their_checkers(folder):
    testing.check_source(f"mypkg.data:open_arrays:{folder}")
    testing.check_evaluator(f"mypkg.evals:rank1:{folder}")
    testing.check_detector("mypkg.faces:whole_picture")


def test_all_of_them_train_together(run, config):
    assert run.step == 3
    assert set(run.results) == {"eval/rank1/accuracy"}
    lines = [
        json.loads(x) for x in (Path(config.workdir) / "metrics.jsonl").read_text().split("\n") if x
    ]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()
    stored = json.loads((Path(config.workdir) / "config.json").read_text())
    assert stored["head"]["loss"] == "mypkg.losses:mv_softmax"


def test_the_same_command_resumes_and_a_longer_one_is_another_run(run, config):
    again = train(config)
    assert again.step == 3 and again.results == run.results


def test_the_run_is_opened_for_evaluation(run, config, folder):
    network = Network.from_workdir(config.workdir, batch_size=8)
    images = np.load(folder / "images.npy")
    labels = np.load(folder / "labels.npy")
    unit = network(images)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gallery = np.arange(0, len(images), IMAGES)
    probes = np.setdiff1d(np.arange(len(images)), gallery)
    found = labels[gallery][np.argmax(unit[probes] @ unit[gallery].T, axis=1)]
    assert np.mean(found == labels[probes]) == pytest.approx(run.results["eval/rank1/accuracy"])


@pytest.mark.slow
def test_a_run_fine_tunes_by_the_names_of_the_network(run, config, folder):
    tuned = configs.replace(
        config,
        workdir=str(folder / "tuned"),
        init_from=config.workdir,
        finetune__frozen=("stem.*", "blocks.0.conv.*"),
    )
    assert train(tuned).step == 3
    before, after = (Network.from_workdir(c.workdir, batch_size=8) for c in (config, tuned))
    moved = {n for n, x in after.params.items() if not np.array_equal(x, before.params[n])}
    assert not any(name.startswith(("stem.", "blocks.0.conv.")) for name in moved)
    assert "fc.kernel" in moved


def test_without_a_torch_twin_there_is_no_torch_file(run, config, tmp_path):
    with pytest.raises(UserError, match=r"mypkg\.nets:convnext has no torch twin.*jax2onnx"):
        to_torch.export(Path(config.workdir), tmp_path / "backbone.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_trains_a_network_without_a_torch_twin_succeeds(run, config, folder, capsys):
    recipe = folder / "again.py"
    recipe.write_text(
        "from pathlib import Path\nfrom arcface_jax.config import loading\n\n\n"
        "def get_config():\n"
        f"    return loading.from_json(Path({config.workdir!r}, 'config.json').read_text(), "
        "source='config.json')\n"
    )
    assert train_command.main([str(recipe), "--compilation-cache="]) == 0
    *_, note, result = capsys.readouterr().out.strip().splitlines()
    assert note.startswith("no backbone.pth: mypkg.nets:convnext has no torch twin")
    assert result.startswith("RESULT ") and not (Path(config.workdir) / "backbone.pth").exists()


def test_onnx_without_jax2onnx_names_the_extra(run, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    network = Network.from_workdir(config.workdir, batch_size=8)
    with pytest.raises(UserError, match=r"arcface-jax\[jax2onnx\]"):
        to_onnx.export(network, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "normalization", ["outside", pytest.param("inside", marks=pytest.mark.slow)]
)
def test_onnx_by_way_of_jax2onnx_gives_jaxs_embeddings(
    run, config, folder, tmp_path, normalization
):
    pytest.importorskip("jax2onnx", exc_type=ImportError)
    import onnxruntime

    network = Network.from_workdir(config.workdir, batch_size=8)
    path = tmp_path / "model.onnx"
    form = Form(normalization=normalization)
    assert to_onnx.export(network, path, form=form).error < 1e-4
    session = onnxruntime.InferenceSession(path)
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("input", ["batch", 3, 112, 112])
    assert (out.name, out.shape) == ("embedding", ["batch", 16])
    images = np.load(folder / "images.npy")[:5]
    x = images.transpose(0, 3, 1, 2).astype(np.float32)
    x = x if normalization == "inside" else (x - 127.5) / 127.5
    (embeddings,) = session.run(None, {"input": x})
    np.testing.assert_allclose(embeddings, network(images), rtol=1e-3, atol=1e-4)


BROKEN_NET = """
import jax, numpy as np
from mypkg.nets import ConvNeXt

class Net(ConvNeXt):
    def __call__(self, x, *, train, keys=None):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return super().__call__(jax.pure_callback(np.asarray, shape, x), train=train)

def net(model, *, bn_groups, init):
    return Net(model, width=8, depth=1, bn_groups=bn_groups, init=init)
"""


def test_onnx_names_an_operation_that_cannot_be_translated(folder, tmp_path):
    pytest.importorskip("jax2onnx", exc_type=ImportError)
    (folder / "mypkg" / "callback.py").write_text(BROKEN_NET)
    name = "mypkg.callback:net"
    arrays = testing.registry.build(name, embedding_size=16).init(0)
    network = Network(name, *arrays, embedding_size=16, batch_size=8, devices=1)
    with pytest.raises(UserError, match="pure_callback"):
        to_onnx.export(network, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
