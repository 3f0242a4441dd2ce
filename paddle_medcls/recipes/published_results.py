"""Published MedMNIST results that ours are compared with: test (AUC, accuracy).

"28" and "224" are the side of the input in pixels. In the paper, 224 is the 28-pixel image enlarged; it is not
MedMNIST+'s 224-pixel image.
"""

from __future__ import annotations

COLUMNS = (
    "resnet18 (28)",
    "resnet18 (224)",
    "resnet50 (28)",
    "resnet50 (224)",
    "auto-sklearn",
    "AutoKeras",
    "Google AutoML",
)

_TABLE = """
pathmnist      .983/.907 .989/.909 .990/.911 .989/.892 .934/.716 .959/.834 .944/.728
chestmnist     .768/.947 .773/.947 .769/.947 .773/.948 .649/.779 .742/.937 .778/.948
dermamnist     .917/.735 .920/.754 .913/.735 .912/.731 .902/.719 .915/.749 .914/.768
octmnist       .943/.743 .958/.763 .952/.762 .958/.776 .887/.601 .955/.763 .963/.771
pneumoniamnist .944/.854 .956/.864 .948/.854 .962/.884 .942/.855 .947/.878 .991/.946
retinamnist    .717/.524 .710/.493 .726/.528 .716/.511 .690/.515 .719/.503 .750/.531
breastmnist    .901/.863 .891/.833 .857/.812 .866/.842 .836/.803 .871/.831 .919/.861
bloodmnist     .998/.958 .998/.963 .997/.956 .997/.950 .984/.878 .998/.961 .998/.966
tissuemnist    .930/.676 .933/.681 .931/.680 .932/.680 .828/.532 .941/.703 .924/.673
organamnist    .997/.935 .998/.951 .997/.935 .998/.947 .963/.762 .994/.905 .990/.886
organcmnist    .992/.900 .994/.920 .992/.905 .993/.911 .976/.829 .990/.879 .988/.877
organsmnist    .972/.782 .974/.778 .972/.770 .975/.785 .945/.672 .974/.813 .964/.749
"""

PAPER = {
    name: tuple(tuple(float(figure) for figure in cell.split("/")) for cell in cells)
    for name, *cells in (line.split() for line in _TABLE.strip().splitlines())
}
"""Yang et al., MedMNIST v2, Scientific Data 2023, Table 3; the columns are COLUMNS."""

PAPER_RUNS = 3
"""Number of runs that a cell of PAPER is the mean of. The authors' prediction files (record 7782114 on zenodo.org) are
numbered 1 to 3 for each network; those of BreastMNIST, ResNet-18 (28), are named .898/.872, .917/.872 and
.889/.846, whose mean is the table's .901/.863."""

MEDMNIST_STUDY = {
    ("pathmnist", "resnet18"): (0.978, 0.864),
    ("pathmnist", "resnet50"): (0.985, 0.836),
    ("chestmnist", "resnet18"): (0.766, 0.947),
    ("dermamnist", "resnet18"): (0.915, 0.741),
    ("dermamnist", "resnet50"): (0.903, 0.728),
    ("pneumoniamnist", "resnet18"): (0.960, 0.837),
    ("pneumoniamnist", "resnet50"): (0.960, 0.897),
    ("retinamnist", "resnet18"): (0.740, 0.503),
    ("retinamnist", "resnet50"): (0.745, 0.525),
    ("breastmnist", "resnet18"): (0.883, 0.827),
    ("breastmnist", "resnet50"): (0.864, 0.821),
    ("organcmnist", "resnet18"): (0.990, 0.884),
}
"""MedMNIST study (ResNet-18 and ResNet-50), (data set, network) -> (AUC, accuracy), 28 pixels. Its rows ChestMNIST
ResNet-50 (.988/.871) and OrganMNIST_C ResNet-50 (.975/.746) are left out: they look like rows of other data sets."""

SEED_NOISE = {
    "breastmnist": (0.014, 0.015),
    "pneumoniamnist": (0.014, 0.054),
    "retinamnist": (0.008, 0.025),
    "bloodmnist": (0.0005, 0.001),
    "octmnist": (0.005, 0.030),
}
"""Standard deviation over seeds of ResNet-18 at 28 pixels, (AUC, accuracy): of independent re-runs, and for
BreastMNIST of the authors' own three runs; the largest where several are known."""


def paper(flag: str, model: str, side: int = 28) -> tuple[float, float] | None:
    """The paper's test result of a network on a data set.

    Args:
        side: of the input, in pixels.

    Returns:
        (AUC, accuracy); None if the paper has no such result.
    """
    column = f"{model} ({side})"
    if flag not in PAPER or column not in COLUMNS:
        return None
    auc, accuracy = PAPER[flag][COLUMNS.index(column)]
    return auc, accuracy
