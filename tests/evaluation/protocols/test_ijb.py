"""The whole IJB protocol on generated sets, against plain loops with scikit-learn's curve."""

import itertools

import numpy as np
import plain_ijb
import pytest
from sklearn.metrics import roc_curve

from arcface_jax.data import opening
from arcface_jax.errors import ConfigError, DataError, UserError
from arcface_jax.evaluation import roc, shards
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.evaluation.protocols import identification, ijb, ijb_files, ijb_generator

ALL_OPTIONS = ["".join(c) or "none" for k in range(4) for c in itertools.combinations("NDF", k)]
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PROJECTION = np.random.default_rng(0).normal(size=(28 * 28 * 3, 48)).astype(np.float32)


class Coarse:
    """Coarse pixels, projected: knows people better than chance, and lengths differ."""

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        x = images[:, ::4, ::4].reshape(len(images), -1).astype(np.float32) / 255 - 0.5
        return x @ PROJECTION * (1 + 3 * x.std(axis=1, keepdims=True))

    input = ModelInput(embedding_size=48, digest="coarse")

    def digest(self) -> str:
        return self.input.digest


embed = Coarse()


@pytest.fixture(scope="module", params=["ijbb", "ijbc"])
def generated(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = opening.SyntheticSource(seed=1, identities=20, images_per_identity=7)
    ijb_generator.generate(source, folder, protocol=request.param, subjects=20, pairs=2000)
    ijb_set = ijb_files.read(folder, request.param)
    return folder, ijb_set, ijb.embed_images(ijb_set, embed, folder=folder / "f", flip=True)


@pytest.fixture(scope="module")
def entries(generated):
    folder, ijb_set, _ = generated
    return plain_ijb.features(folder, ijb_set.name, embed)


@pytest.mark.parametrize("letters", ALL_OPTIONS)
def test_pairs_and_identification_equal_plain_loops(generated, entries, letters: str):
    folder, ijb_set, extracted = generated
    result = ijb.evaluate(ijb_set, extracted, ijb.Options.parse(letters))
    pooled = plain_ijb.templates(entries, letters.replace("none", ""))
    score, label = plain_ijb.pair_scores(folder, ijb_set.name, pooled)
    assert (result.same, result.different) == (np.sum(label == 1), np.sum(label == 0))
    for far, nearest, standard in zip(FARS, result.nearest[::-1], result.tars[::-1], strict=True):
        assert nearest.far == standard.far == far
        assert nearest.tar == plain_ijb.insightface_tar(score, label, far)
        assert standard.tar == plain_ijb.standard_tar(score, label, far)
    assert [at.tar is None for at in result.tars] == [False, False, False, True, True, True]
    two = ("S1", "S2") if ijb_set.name == "ijbb" else ("G1", "G2")
    probes = plain_ijb.enrolled(folder, f"{ijb_set.name}_1N_probe_mixed")
    galleries = [plain_ijb.enrolled(folder, f"{ijb_set.name}_1N_gallery_{g}") for g in two]
    standard, insightface = result.identification
    expected = plain_ijb.standard_identification(probes, galleries, pooled)
    known = {name: value for name, value in expected.items() if value is not None}
    assert standard.metrics() == pytest.approx(known, abs=1e-12)
    expected = plain_ijb.insightface_identification(probes, galleries, pooled)
    measured = insightface.metrics()
    assert measured == pytest.approx({f"insightface_{k}": v for k, v in expected.items()})
    assert 0.05 < measured["insightface_rank1"] < 0.98  # neither chance nor perfect


def test_the_options_change_the_result(generated):
    _, ijb_set, extracted = generated
    results = [ijb.evaluate(ijb_set, extracted, ijb.Options.parse(x)) for x in ALL_OPTIONS]
    assert len({result.auc for result in results}) == len(ALL_OPTIONS)
    assert results[-1].name == ijb_set.name
    assert results[0].name == f"{ijb_set.name}_none"


@pytest.mark.parametrize("seed", range(40))
def test_insightfaces_tar_follows_sklearns_curve_with_and_without_ties(seed: int):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 400))
    same = rng.random(count) < rng.uniform(0.05, 0.95)
    same[:2] = True, False
    levels = (1, 2, 7, 100, 10**9)[seed % 5]
    score = np.round((rng.normal(size=count) + same) * levels) / levels
    fars = (*FARS, 0.3, 0.5, 0.999)
    found = ijb.nearest_tars(roc.roc(score, same), fars=fars)
    for at in found:
        assert at.tar == plain_ijb.insightface_tar(score, same.astype(int), at.far)
        assert at.reached in roc_curve(same, score)[0]


def test_a_point_above_the_target_may_be_nearest():
    score = np.array([4.0, 3, 2, 1])
    same = np.array([False, True, False, True])
    (at,) = ijb.nearest_tars(roc.roc(score, same), fars=[0.3])
    assert (at.reached, at.tar) == (0.5, 0.5)
    (standard,) = roc.tar_at_far(np.repeat(score, 2), np.repeat(same, 2), fars=[0.3])
    assert standard.tar == 0.0


def test_thinned_curves_keep_the_ends_and_lie_on_the_curve():
    rng = np.random.default_rng(0)
    same = rng.random(5000) < 0.3
    curve = roc.roc(rng.normal(size=5000) + same, same)
    thin = ijb.thinned(curve, 50)
    assert 20 < len(thin.far) <= 51
    assert thin.far[-1] == thin.tar[-1] == 1
    best = {far: max(curve.tar[curve.far == far]) for far in thin.far}
    assert all(best[far] == tar for far, tar in zip(thin.far, thin.tar, strict=True))


@pytest.mark.parametrize("letters", ["NX", "NN", "1"])
def test_unknown_options_are_refused(letters: str):
    with pytest.raises(ConfigError, match=letters):
        ijb.Options.parse(letters)


def test_without_csv_files_only_pairs_are_verified(generated, tmp_path):
    folder, ijb_set, extracted = generated
    meta = tmp_path / "meta"
    meta.mkdir()
    for path in (folder / "meta").glob("*.txt"):
        (meta / path.name).write_bytes(path.read_bytes())
    result = ijb.evaluate(ijb_files.read(tmp_path, ijb_set.name), extracted, ijb.Options())
    assert result.identification == ()
    assert (
        result.metrics().items()
        <= ijb.evaluate(ijb_set, extracted, ijb.Options()).metrics().items()
    )


def test_the_same_seed_makes_the_same_files(generated, tmp_path):
    folder, ijb_set, _ = generated
    source = opening.SyntheticSource(seed=1, identities=20, images_per_identity=7)
    ijb_generator.generate(source, tmp_path, protocol=ijb_set.name, subjects=20, pairs=2000)
    for name in ("meta", "loose_crop"):
        files = sorted((folder / name).iterdir())
        assert [p.name for p in files] == sorted(p.name for p in (tmp_path / name).iterdir())
        assert all(p.read_bytes() == (tmp_path / name / p.name).read_bytes() for p in files)
    with pytest.raises(DataError, match="exists already"):
        ijb_generator.generate(source, tmp_path, subjects=20)


def test_the_smallest_generated_set_is_read_and_evaluated(tmp_path):
    source = opening.SyntheticSource(seed=1, identities=3, images_per_identity=4)
    for options, expected in (
        ({"subjects": 1}, "--subjects 1 must be at least 2"),
        ({"subjects": 0}, "--subjects 0 must"),
        ({"subjects": 2, "pairs": 0}, "--pairs 0 must be at least 1"),
        ({"subjects": 4}, "the source has 3 people .* and 4 are asked for"),
    ):
        with pytest.raises(UserError, match=expected):
            ijb_generator.generate(source, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
    ijb_generator.generate(source, tmp_path / "two", subjects=2, pairs=10)
    found = ijb_files.read(tmp_path / "two", "ijbc")
    assert [len(gallery.subjects) for gallery in found.galleries] == [1, 1]
    extracted = ijb.embed_images(found, embed, folder=tmp_path / "features", flip=False)
    assert ijb.evaluate(found, extracted, ijb.Options(flip=False)).identification


def test_generated_crops_align_back_to_the_faces_they_were_made_of(generated):
    _, ijb_set, _ = generated
    source = opening.SyntheticSource(seed=1, identities=20, images_per_identity=7)
    faces = np.stack([source[i][0] for i in range(len(source))])[:, 20:100, 25:90].astype(float)
    for i in range(0, len(ijb_set.images), 17):
        aligned = shards.aligned_image(ijb_set.images[i], ijb_set.landmarks[i])
        errors = np.abs(faces - aligned[20:100, 25:90]).mean(axis=(1, 2, 3))
        assert errors.min() < 8 < np.partition(errors, 1)[1]


@pytest.mark.parametrize("seed", range(10))
def test_identification_with_ties_equals_plain_loops(seed: int):
    rng = np.random.default_rng(seed)
    vectors = dict(enumerate(rng.integers(-1, 2, (90, 4)).astype(float)))
    galleries = [{k: k for k in range(15)}, {k: k for k in range(15, 30)}]
    probes = {k: int(rng.integers(0, 30)) for k in range(30, 90)}
    standard = identification.standard_rule(
        [_search(vectors, probes, gallery) for gallery in galleries]
    )
    expected = plain_ijb.standard_identification(probes, galleries, vectors)
    assert standard.metrics() == pytest.approx(
        {name: value for name, value in expected.items() if value is not None}
    )
    both = identification.insightface_rule(**_arrays(vectors, probes, galleries[0] | galleries[1]))
    expected = plain_ijb.insightface_identification(probes, galleries, vectors)
    assert both.metrics() == pytest.approx({f"insightface_{k}": v for k, v in expected.items()})


def _arrays(vectors, probes, gallery):
    return {
        "probes": np.stack([vectors[k] for k in probes]),
        "probe_subjects": np.array(list(probes.values())),
        "gallery": np.stack([vectors[k] for k in gallery]),
        "gallery_subjects": np.array(list(gallery.values())),
    }


def _search(vectors, probes, gallery):
    return identification.search(**_arrays(vectors, probes, gallery))


def test_blocks_of_probes_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {
        "probes": rng.normal(size=(37, 8)),
        "probe_subjects": rng.integers(0, 12, 37),
        "gallery": rng.normal(size=(20, 8)),
        "gallery_subjects": rng.integers(0, 12, 20),
    }
    whole = identification.search(**arrays, keep=30)
    monkeypatch.setattr(identification, "_SCORES", 60)
    for one, other in zip(whole, identification.search(**arrays, keep=30), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_equal_embeddings_earn_no_rank_one():
    ones = {k: np.ones(4) for k in range(20)}
    found = _search(ones, {k: k - 10 for k in range(10, 20)}, {k: k for k in range(10)})
    assert found.rank.tolist() == [10] * 10


def test_probes_without_exactly_one_mate_are_named():
    vectors = {k: np.ones(2) for k in range(6)}
    with pytest.raises(DataError, match="subject 7 of the probes has 0 templates"):
        identification.insightface_rule(**_arrays(vectors, {3: 1, 4: 7}, {0: 1, 1: 2}))
    with pytest.raises(DataError, match="subject 1 of the probes has 2 templates"):
        identification.insightface_rule(**_arrays(vectors, {3: 1}, {0: 1, 1: 1}))
    with pytest.raises(DataError, match="no probe has a mate in gallery 1"):
        identification.standard_rule([_search(vectors, {3: 9}, {0: 1, 1: 2})])
