"""Toy people: each is a pattern of 7 x 7 colored squares, and a model that reads the pattern."""

import csv
import pickle
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper


def person(number: int) -> np.ndarray:
    """(7, 7, 3) float, the pattern."""
    return np.random.default_rng(1000 + number).uniform(-1, 1, (7, 7, 3))


def image(number: int, shot: int) -> np.ndarray:
    """(112, 112, 3) uint8 RGB: a person with noise that is different in every shot."""
    noise = np.random.default_rng([number, shot]).normal(0, 0.35, (7, 7, 3))
    small = np.clip(127.5 + 80 * (person(number) + noise), 0, 255).astype(np.uint8)
    return small.repeat(16, axis=0).repeat(16, axis=1)


def encoded(number: int, shot: int) -> bytes:
    """PNG."""
    return cv2.imencode(".png", image(number, shot)[..., ::-1])[1].tobytes()


def write_list(folder: Path, people: list[tuple[int, int, str]]) -> Path:
    """A list of images: (person, shot, label) each."""
    folder.mkdir(parents=True)
    with (folder / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        for number, shot, label in people:
            name = f"{number}_{shot}.png"
            (folder / name).write_bytes(encoded(number, shot))
            writer.writerow((name, label))
    return folder / "all.csv"


def write_bin(path: Path, pairs: list[tuple[tuple[int, int], tuple[int, int]]]) -> Path:
    """A verification set of pairs of (person, shot)."""
    images = [encoded(*face) for pair in pairs for face in pair]
    same = [first[0] == second[0] for first, second in pairs]
    path.write_bytes(pickle.dumps((images, same)))
    return path


def write_model(path: Path) -> Path:
    """An ONNX file whose embedding is the mean color of each square."""
    pool = helper.make_node(
        "AveragePool", ["data"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]
    )
    flat = helper.make_node("Flatten", ["pooled"], ["embedding"])
    graph = helper.make_graph(
        [pool, flat],
        "squares",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 147])],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path
