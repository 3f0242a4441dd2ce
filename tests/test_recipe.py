"""Recipes: what they accept, what they say of faults, and that they survive a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import recipe

from paddle_medcls import recipes
from paddle_medcls.cli.listing import show
from paddle_medcls.core.errors import RecipeError
from paddle_medcls.data.datasets import dataset_names
from paddle_medcls.preprocessing.transforms import Preprocessing
from paddle_medcls.recipes import all_recipes, get_recipe
from paddle_medcls.recipes.recipe import CHOICES, IMAGENET_MEAN, IMAGENET_STD, Recipe


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_project_recipes(name: str) -> None:
    found = get_recipe(name)
    assert found.name == name
    assert found.source and found.dataset in dataset_names()
    assert Recipe.from_json(json.loads(json.dumps(found.to_json()))) == found
    for key, figure in found.targets:
        split, _, metric = key.partition("/")
        assert split in ("train", "val", "test") and metric in ("accuracy", "auc") and 0 < figure < 1


def test_a_data_set_has_a_recipe_of_its_name() -> None:
    assert {"palm", "covid"} <= set(all_recipes())
    assert get_recipe("palm").dataset == "palm"


def test_published_constants() -> None:
    """The PALM and COVID-19 tutorials."""
    palm = get_recipe("palm_tutorial")
    assert (palm.epochs, palm.batch_size, palm.lr, palm.end_lr, palm.decay_epochs) == (10, 10, 0.005, 0.001, (2.5,))
    assert palm.preprocessing == Preprocessing(224, channels="bgr", mean=(127.5,) * 3, std=(127.5,) * 3)
    covid = get_recipe("covid_notebook")
    assert (covid.epochs, covid.batch_size, covid.lr, covid.momentum, covid.warmup_epochs) == (50, 50, 0.01, 0.9, 5)
    pixels = covid.preprocessing
    assert (pixels.mean, pixels.std, pixels.resize_dtype) == ((129.90909919,) * 3, (59.0183735,) * 3, "float32")
    assert dict(covid.targets) == {"test/accuracy": 0.9651}


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    original = get_recipe("palm").replace(targets=(("val/accuracy", 0.94), ("val/auc", 0.99)))
    path.write_text(json.dumps(original.to_json()))
    assert Recipe.from_file(path) == original
    assert isinstance(Recipe.from_file(path).targets[0], tuple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "not a recipe"),
        ("{}", "not a recipe"),
        ('{"name": "a", "source": "b"}', "not a recipe"),
        ('{"name": "a", "source": "b", "dataset": "palm", "learning_rate": 1}', "unknown recipe field 'learning_rate'"),
        ('{"name": "a", "source": "b", "dataset": "palm", "lr": "fast"}', "lr: 'fast' is of the wrong type"),
        ('{"name": "a", "source": "b", "dataset": "palm", "epochs": 2.5}', "epochs: 2.5 is of the wrong type"),
        ('{"name": "a", "source": "b", "dataset": "palm", "epochs": true}', "epochs: True is of the wrong type"),
        ('{"name": "a", "source": "b", "dataset": "palm", "mean": 127.5}', "mean: 127.5 is of the wrong type"),
        ('{"name": "a", "source": "b", "dataset": "palm", "mean": ["a", "b", "c"]}', "mean"),
        ('{"name": "a", "source": "b", "dataset": "palm", "std": [null, 1, 1]}', "std"),
        ('{"name": "a", "source": "b", "dataset": "palm", "targets": ["val/accuracy"]}', "targets"),
        ('{"name": "a", "source": "b", "dataset": "palm", "lr": NaN}', "NaN is not a finite number"),
        ('{"name": "a", "source": "b", "dataset": "palm", "lr": 0.1, "lr": 0.2}', "the key 'lr' occurs twice"),
        ('{"name": "a", "source": "b", "dataset": "palm", "weight_decay": Infinity}', "Infinity is not a finite"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(tmp_path / "recipe.json")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.json"):
        Recipe.from_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("mistyped", "meant"), [("batchsize", "batch_size"), ("warmup", "warmup_epochs"), ("momentun", "momentum")]
)
def test_an_unknown_field_is_answered_with_the_nearest(mistyped: str, meant: str) -> None:
    for attempt in (lambda: recipe().replace(**{mistyped: 1}), lambda: recipe().override([f"{mistyped}=1"])):
        with pytest.raises(RecipeError, match=f"unknown recipe field '{mistyped}'; did you mean '{meant}'"):
            attempt()


def test_a_recipes_name_leads_to_its_module() -> None:
    assert all(recipes.find_recipe(name) == found for name, found in all_recipes().items())
    assert recipes.find_recipe("nothing") is None and recipes.find_recipe("palm_nothing") is None


@pytest.mark.parametrize("text", ["def (", "import no_such_module", "raise SystemError", "FAULTY = Recipe('faulty')"])
def test_a_faulty_file_stops_its_own_recipes_alone(text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "faulty.py").write_text(f"from paddle_medcls.recipes.recipe import Recipe\n{text}\n")
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    assert get_recipe("palm").name == "palm" and get_recipe("breastmnist").dataset == "breastmnist"
    for name in ("faulty", "faulty_new"):
        with pytest.raises(RecipeError, match="^recipes/faulty.py: "):
            get_recipe(name)
    with pytest.raises(RecipeError, match="unknown recipe 'pallm'; did you mean 'palm'[^$]*recipes/faulty.py: "):
        get_recipe("pallm")
    assert show("recipe") == 1
    shown = capsys.readouterr()
    assert "palm_tutorial" in shown.out and shown.err.startswith("RecipeError: recipes/faulty.py: ")


def test_unknown_recipe_and_choice_suggest() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'pallm'; did you mean 'palm'"):
        get_recipe("pallm")
    with pytest.raises(RecipeError, match="'cosin' is not one of .*did you mean 'cosine'"):
        recipe(schedule="cosin")


def test_all_faults_come_at_once() -> None:
    wrong = {
        "epochs": 0,
        "batch_size": 0,
        "lr": 0.0,
        "momentum": 1.0,
        "flip": 1.5,
        "weight_decay": -1.0,
        "seed": -1,
        "std": (1.0, 0.0, 1.0),
        "mean": (1.0,),
        "monitor": "f1",
        "schedule": "polynomial",
        "end_lr": 1.0,
    }
    with pytest.raises(RecipeError) as caught:
        recipe(**wrong)
    lines = str(caught.value).splitlines()
    for field in {*wrong, "decay_epochs"} - {"schedule"}:
        assert any(line.strip().startswith(f"{field}:") for line in lines), field


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_is_accepted_and_others_are_not(field: str) -> None:
    for value in CHOICES[field]:
        extra = {"mean": (1.0,), "std": (1.0,)} if value == "gray" else {}
        extra |= {"decay_epochs": (1.0,)} if value == "polynomial" else {}
        extra |= {"interpolation": "area"} if value == "reduced" else {}
        assert recipe(**{field: value}, **extra).to_json()[field] == value
    with pytest.raises(RecipeError, match=field):
        recipe(**{field: "something else"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=0.02", 0.02),
        ("lr=1e-3", 0.001),
        ("epochs=7", 7),
        ("test_flips=true", True),
        ("test_flips=0", False),
        ("model=resnet34", "resnet34"),
        ("mean=1,2,3", (1.0, 2.0, 3.0)),
        ("decay_epochs=", ()),
        ("targets=val/accuracy:0.9,val/auc:0.95", (("val/accuracy", 0.9), ("val/auc", 0.95))),
        ("pretrained=a=b.pdparams", "a=b.pdparams"),
    ],
)
def test_overrides_are_parsed_by_the_fields_type(text: str, value: object) -> None:
    found = recipe().override([text]).to_json()[text.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["epochs=2.5", "lr=fast", "test_flips=maybe", "mean=1,b", "targets=val/accuracy", "lr"]
)
def test_an_override_that_cannot_be_parsed(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        recipe().override([text])


def test_imagenet_weights_bring_their_preprocessing() -> None:
    """Whichever way they are asked for; contradictions are refused, agreement is not."""
    bgr = recipe(channels="bgr", statistics="train")
    for found in (bgr.override(["pretrained=imagenet"]), bgr.replace(pretrained="imagenet")):
        pixels = found.preprocessing
        assert (pixels.channels, pixels.mean, pixels.std) == ("rgb", IMAGENET_MEAN, IMAGENET_STD)
        assert (found.pretrained, found.statistics) == ("imagenet", "fixed")
    assert bgr.override(["pretrained=imagenet", "channels=rgb"]).preprocessing.channels == "rgb"
    with pytest.raises(RecipeError, match="pretrained=imagenet contradicts 2 field") as caught:
        bgr.override(["channels=bgr", "std=1,1,1", "pretrained=imagenet"])
    assert "channels: 'bgr'" in str(caught.value) and "std: (1.0, 1.0, 1.0)" in str(caught.value)
    assert bgr.replace(pretrained="palm.pdparams").preprocessing.channels == "bgr"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed=18446744073709551616", "seed: 18446744073709551616; expected 0 to"),
        ("seed=-1", "seed: -1"),
        ("size_px=5000", "size_px: 5000; expected at most 2048"),
    ],
)
def test_numbers_that_paddle_or_memory_cannot_take(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe().override([text])
    assert recipe(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(RecipeError, match="lr: 1000.* is of the wrong type"):
        recipe().replace(lr=10**400)


def test_with_epochs_keeps_shares() -> None:
    assert recipe(epochs=50, warmup_epochs=5).with_epochs(10).warmup_epochs == 1
    short = recipe(epochs=10, schedule="polynomial", decay_epochs=(2.5,)).with_epochs(2)
    assert (short.epochs, short.decay_epochs) == (2, (0.5,))
    steps = recipe(epochs=100, schedule="step", decay_epochs=(50.0, 75.0)).with_epochs(200)
    assert steps.decay_epochs == (100, 150)


@pytest.mark.parametrize("name", sorted(all_recipes()))
@pytest.mark.parametrize("epochs", [1, 2, 1000])
def test_every_recipe_can_be_made_shorter_and_longer(name: str, epochs: int) -> None:
    assert get_recipe(name).with_epochs(epochs).epochs == epochs


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        recipe().lr = 1.0


def test_differences() -> None:
    assert recipe().differences(recipe(lr=0.5, seed=3)) == ["lr: 0.01 -> 0.5", "seed: 0 -> 3"]
    assert recipe().differences(recipe()) == []
    assert recipe().differences(recipe(source="another text", targets=(("test/auc", 0.5),))) == []
