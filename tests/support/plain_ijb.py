"""The IJB protocols as slow loops, written from their description, for the tests alone."""

import math
from pathlib import Path

import cv2
import numpy as np
from sklearn.metrics import roc_curve

POINTS = [
    [38.2946, 51.6963],
    [73.5318, 51.5014],
    [56.0252, 71.7366],
    [41.5493, 92.3655],
    [70.7299, 92.2041],
]


def features(folder: Path, protocol: str, embed) -> list[dict]:
    """One entry an image: name, template, medium, score, plain and mirrored feature."""
    entries = []
    meta = folder / "meta"
    lines = (meta / f"{protocol}_name_5pts_score.txt").read_text().splitlines()
    others = (meta / f"{protocol}_face_tid_mid.txt").read_text().splitlines()
    for line, other in zip(lines, others, strict=True):
        name, *numbers, score = line.split()
        same_name, template, medium = other.split()
        assert name == same_name
        image = cv2.cvtColor(cv2.imread(str(folder / "loose_crop" / name)), cv2.COLOR_BGR2RGB)
        matrix = least_squares(np.array(numbers, float).reshape(5, 2), np.array(POINTS))
        face = cv2.warpAffine(image, matrix, (112, 112), borderValue=0.0)
        plain, mirrored = embed(face[None])[0], embed(face[None, :, ::-1])[0]
        entries.append(
            {
                "template": int(template),
                "medium": int(medium),
                "score": float(np.float32(score)),
                "plain": plain.astype(float),
                "mirrored": mirrored.astype(float),
            }
        )
    return entries


def least_squares(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity by the normal equations of x' = a x - b y + c, y' = b x + a y + d."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(points, target, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        wanted += [u, v]
    (a, b, c, d), *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    return np.array([[a, -b, c], [b, a, d]])


def templates(entries: list[dict], options: str) -> dict[int, np.ndarray]:
    pooled = {}
    for number in {entry["template"] for entry in entries}:
        media: dict[int, list] = {}
        for entry in entries:
            if entry["template"] == number:
                feature = entry["plain"] + (entry["mirrored"] if "F" in options else 0)
                if "N" not in options:
                    feature = feature / math.sqrt(sum(feature**2))
                if "D" in options:
                    feature = feature * entry["score"]
                media.setdefault(entry["medium"], []).append(feature)
        total = sum(sum(frames) / len(frames) for frames in media.values())
        pooled[number] = total / math.sqrt(sum(total**2))
    return pooled


def pair_scores(folder: Path, protocol: str, pooled: dict) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = [], []
    path = folder / "meta" / f"{protocol}_template_pair_label.txt"
    for line in path.read_text().splitlines():
        one, other, label = line.split()
        scores.append(sum(pooled[int(one)] * pooled[int(other)]))
        labels.append(int(label))
    return np.array(scores), np.array(labels)


def insightface_tar(score: np.ndarray, label: np.ndarray, far: float) -> float:
    """Of scikit-learn's points the nearest; the higher FAR, then the higher TAR, among equals."""
    fars, tars, _ = roc_curve(label, score)
    return min((abs(f - far), -f, -t) for f, t in zip(fars, tars, strict=True))[2] * -1


def standard_tar(score: np.ndarray, label: np.ndarray, far: float) -> float | None:
    """The best TAR of all thresholds with a FAR not above the target."""
    positive, negative = score[label == 1], score[label == 0]
    if 1 / len(negative) > far:
        return None
    best = 0.0
    for threshold in [*np.unique(score), np.inf]:
        if np.mean(negative >= threshold) <= far:
            best = max(best, float(np.mean(positive >= threshold)))
    return best


def enrolled(folder: Path, name: str) -> dict[int, int]:
    lines = (folder / "meta" / f"{name}.csv").read_text().splitlines()[1:]
    return {int(line.split(",")[0]): int(line.split(",")[1]) for line in lines}


def insightface_identification(probes, galleries, vectors) -> dict[str, float]:
    """One gallery of both; the threshold from all scores between different people."""
    gallery = galleries[0] | galleries[1]
    mates, others, ranks = [], [], []
    for probe, subject in probes.items():
        scores = {g: float(vectors[probe] @ vectors[g]) for g in gallery}
        (mate,) = [g for g in gallery if gallery[g] == subject]
        mates.append(scores[mate])
        wrong = [score for g, score in scores.items() if g != mate]
        others += wrong
        ranks.append(1 + sum(score >= scores[mate] for score in wrong))
    result = {f"rank{k}": np.mean(np.array(ranks) <= k) for k in (1, 5, 10)}
    others.sort(reverse=True)
    for fpir in (0.01, 0.1):
        threshold = others[math.ceil(fpir * len(probes)) - 1]
        result[f"tpir@fpir={fpir:g}"] = np.mean([mate > threshold for mate in mates])
    return result


def standard_identification(probes, galleries, vectors) -> dict[str, float | None]:
    """Each gallery by itself: probes with and without a mate, thresholds tried one by one."""
    each = []
    for gallery in galleries:
        mated, unmated = [], []
        for probe, subject in probes.items():
            scores = {g: float(vectors[probe] @ vectors[g]) for g in gallery}
            mates = [score for g, score in scores.items() if gallery[g] == subject]
            wrong = [score for g, score in scores.items() if gallery[g] != subject]
            if mates:
                mated.append((max(mates), 1 + sum(score >= max(mates) for score in wrong)))
            else:
                unmated.append(max(wrong))
        result = {f"rank{k}": np.mean([rank <= k for _, rank in mated]) for k in (1, 5, 10)}
        for fpir in (0.01, 0.1):
            best = None if 1 / len(unmated) > fpir else 0.0
            for threshold in sorted({*unmated, *(score for score, _ in mated)}):
                if best is not None and np.mean(np.array(unmated) >= threshold) <= fpir:
                    hits = [score >= threshold and rank == 1 for score, rank in mated]
                    best = max(best, np.mean(hits))
            result[f"tpir@fpir={fpir:g}"] = best
        each.append(result)
    return {
        name: None if None in (one[name] for one in each) else np.mean([one[name] for one in each])
        for name in each[0]
    }
