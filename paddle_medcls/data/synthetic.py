"""Synthetic images: fundus photographs, chest radiographs, OCT scans, and the small images of MedMNIST."""

from __future__ import annotations

import cv2
import numpy as np

from paddle_medcls.data.datasets.medmnist import card_of

SIDE = 160  # height of an image in pixels; MedMNIST's images have the size of their set


def fundus(rng: np.random.Generator, pathologic: bool) -> np.ndarray:
    """A synthetic fundus photograph: a disc with vessels and an optic nerve head.

    Args:
        pathologic: paler, with atrophy around the nerve head.

    Returns:
        uint8 (SIDE, SIDE, 3), BGR.
    """
    ground = np.array([40, 70, 190]) * rng.uniform(0.75, 1.1)
    if pathologic:
        ground = ground * 0.8 + np.array([70, 120, 190]) * 0.25  # the thin retina looks paler
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    shade = 1 - 0.9 * ((x - rng.uniform(-0.1, 0.1)) ** 2 + (y - rng.uniform(-0.1, 0.1)) ** 2)
    image = (ground * shade[:, :, None]).astype(np.float32)
    nerve = np.array([SIDE * (0.5 + rng.choice([-1, 1]) * rng.uniform(0.12, 0.2)), SIDE * rng.uniform(0.44, 0.56)])
    centre, radius = tuple(int(v) for v in nerve), int(SIDE * rng.uniform(0.055, 0.075))
    for _ in range(rng.integers(9, 13)):
        _vessel(image, nerve, rng)
    if pathologic:
        halo = np.zeros((SIDE, SIDE), np.uint8)
        axes = (int(radius * rng.uniform(1.7, 2.6)), int(radius * rng.uniform(1.5, 2.2)))
        cv2.ellipse(halo, centre, axes, rng.uniform(0, 180), 0, 360, 255, -1)
        for _ in range(rng.integers(1, 5)):  # patches of atrophy
            patch = tuple(int(v) for v in rng.uniform(SIDE * 0.3, SIDE * 0.7, 2))
            cv2.circle(halo, patch, int(rng.uniform(2, 7)), 255, -1)
        _blend(image, halo, (150, 200, 225), 0.75)
    disc = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(disc, centre, (radius, int(radius * rng.uniform(1.0, 1.25))), rng.uniform(0, 180), 0, 360, 255, -1)
    _blend(image, disc, (130, 200, 245), 0.9)
    image += rng.normal(0, 4, image.shape)
    image[x**2 + y**2 > 0.23] = 0
    return np.clip(image, 0, 255).astype(np.uint8)


def _vessel(image: np.ndarray, start: np.ndarray, rng: np.random.Generator) -> None:
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.12, 0.12)
    point = start.copy()
    for step in range(14):
        angle += bend + rng.normal(0, 0.06)
        onward = point + 6 * np.array([np.cos(angle), np.sin(angle)])
        thickness = 2 if step < 6 else 1
        cv2.line(image, tuple(map(int, point)), tuple(map(int, onward)), (25, 30, 110), thickness, cv2.LINE_AA)
        point = onward


def _blend(image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], strength: float) -> None:
    weight = cv2.GaussianBlur(mask, (0, 0), 1.5).astype(np.float32)[:, :, None] / 255 * strength
    image[:] = image * (1 - weight) + np.array(color, np.float32) * weight


def radiograph(rng: np.random.Generator, name: str) -> np.ndarray:
    """A synthetic chest radiograph: two lungs with ribs, and opacities by class.

    COVID: patches at the outer edges of both lungs; LungOpacity: one large opacity in one lung;
    ViralPneumonia: streaks in both; Normal: none.

    Returns:
        uint8 (SIDE, SIDE), grey.
    """
    image: np.ndarray = np.full((SIDE, SIDE), rng.uniform(20, 40), np.float32)
    cv2.ellipse(image, (SIDE // 2, int(SIDE * 0.56)), (int(SIDE * 0.43), int(SIDE * 0.52)), 0, 0, 360, 165, -1)
    lungs = np.zeros((SIDE, SIDE), np.uint8)
    width, height = int(SIDE * rng.uniform(0.135, 0.16)), int(SIDE * rng.uniform(0.28, 0.33))
    sides = (int(SIDE * 0.31), int(SIDE * 0.69))
    for left, tilt in zip(sides, (8, -8)):
        cv2.ellipse(lungs, (left, SIDE // 2), (width, height), tilt, 0, 360, 255, -1)
    inside = cv2.GaussianBlur(lungs, (0, 0), 3).astype(np.float32) / 255
    image = image * (1 - inside) + rng.uniform(45, 65) * inside
    for rib in range(7):
        level = int(SIDE * (0.22 + 0.085 * rib))
        for left in sides:
            cv2.ellipse(image, (left, level), (int(SIDE * 0.2), int(SIDE * 0.05)), 0, 190, 350, 135, 2, cv2.LINE_AA)
    opacities = np.zeros((SIDE, SIDE), np.float32)
    if name == "COVID":
        for left, outward in zip(sides, (-1, 1)):
            for _ in range(rng.integers(3, 6)):
                at = (int(left + outward * width * rng.uniform(0.4, 0.9)), int(SIDE * rng.uniform(0.48, 0.72)))
                cv2.circle(opacities, at, int(SIDE * rng.uniform(0.03, 0.06)), 1.0, -1)
    elif name == "LungOpacity":
        at = (int(rng.choice(sides)), int(SIDE * rng.uniform(0.42, 0.62)))
        cv2.ellipse(opacities, at, (width, int(SIDE * rng.uniform(0.13, 0.2))), 0, 0, 360, 1.0, -1)
    elif name == "ViralPneumonia":
        for _ in range(rng.integers(50, 70)):
            at = (int(rng.choice(sides) + rng.uniform(-1, 1) * width), int(SIDE * rng.uniform(0.25, 0.75)))
            end = (at[0] + int(rng.uniform(-9, 9)), at[1] + int(rng.uniform(-9, 9)))
            cv2.line(opacities, at, end, 1.0, 1, cv2.LINE_AA)
    blur = 1.0 if name == "ViralPneumonia" else 4.0
    image += cv2.GaussianBlur(opacities, (0, 0), blur) * inside * rng.uniform(70, 95)
    image = cv2.GaussianBlur(image, (0, 0), 0.8) + rng.normal(0, 5, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def spots(rng: np.random.Generator, name: str, marks: np.ndarray) -> np.ndarray:
    """Synthetic MedMNIST images: a bright spot for each label, at a position of its own, on noise.

    Args:
        name: of the MedMNIST set, which decides size S and channels.
        marks: (N, L), 1 where an image has a label.

    Returns:
        uint8 (N, S, S), or (N, S, S, 3) RGB for a set in colour.
    """
    card, side = card_of(name)
    angle = 2 * np.pi * np.arange(marks.shape[1]) / marks.shape[1]
    y, x = np.mgrid[:side, :side] / side - 0.5
    squared_distances = [(x - 0.3 * np.cos(a)) ** 2 + (y - 0.3 * np.sin(a)) ** 2 for a in angle]
    shapes = np.exp(-np.stack(squared_distances) / (2 * 0.06**2))  # (L, S, S)
    images = 60 + 130 * np.tensordot(marks, shapes, 1) + rng.normal(0, 20, (len(marks), side, side))
    if card.channels == 3:
        images = images[..., None] * np.array([1.0, 0.8, 0.7])
    return np.clip(images, 0, 255).astype(np.uint8)


def retina(rng: np.random.Generator, name: str) -> np.ndarray:
    """A synthetic OCT scan: bright retinal layers above dark speckle, deformed by class.

    CNV: a bright mound under the layers; DME: dark cysts between them; DRUSEN: small bumps of the lowest
    layer; NORMAL: the pit of the fovea alone.

    Returns:
        uint8 (SIDE, 1.5 SIDE), grey.
    """
    width = SIDE * 3 // 2
    x = np.arange(width)
    middle = width / 2 + rng.uniform(-0.1, 0.1) * width
    base = SIDE * rng.uniform(0.5, 0.6) + rng.uniform(-12, 12) * ((x - middle) / width) ** 2
    thickness = SIDE * rng.uniform(0.22, 0.27) * (1 - 0.45 * np.exp(-(((x - middle) / (0.09 * width)) ** 2)))
    floor = base.copy()
    if name == "CNV":
        floor -= SIDE * rng.uniform(0.12, 0.2) * np.exp(-(((x - middle) / (0.13 * width)) ** 2))
    elif name == "DRUSEN":
        for _ in range(rng.integers(5, 9)):
            at, wide = rng.uniform(0.1, 0.9) * width, rng.uniform(6, 10)
            floor -= rng.uniform(9, 16) * np.exp(-(((x - at) / wide) ** 2))
    elif name == "DME":
        thickness = thickness + SIDE * 0.12 * np.exp(-(((x - middle) / (0.2 * width)) ** 2))
    y = np.arange(SIDE)[:, None]
    depth = (y - (floor - thickness)) / thickness  # 0 at the top of the retina, 1 at its lowest layer
    image = np.full((SIDE, width), 18.0)
    inside = (depth > 0) & (depth < 1)
    image[inside] = 75 + 35 * np.sin(depth[inside] * 14)
    image[np.abs(y - floor) < 3] = 205  # the pigment epithelium
    image[np.abs(depth) < 0.06] = 150  # the nerve fibres
    under = (y > floor + 3) & (y < base + 22)
    image[under] = (70 + 60 * np.exp(-(y - floor) / 14))[under]
    if name == "CNV":
        image[(y > floor + 3) & (y < base)] = 130
    image = image.astype(np.float32)
    if name == "DME":
        for _ in range(rng.integers(5, 9)):
            at = int(np.clip(middle + rng.normal(0, 0.13) * width, 8, width - 9))
            level = int(floor[at] - thickness[at] * rng.uniform(0.35, 0.7))
            cv2.ellipse(image, (at, level), (int(rng.uniform(4, 9)), int(rng.uniform(4, 8))), 0, 0, 360, 22.0, -1)
    image = cv2.GaussianBlur(image, (0, 0), 1.0) * rng.gamma(12, 1 / 12, image.shape)  # speckle
    return np.clip(image, 0, 255).astype(np.uint8)
