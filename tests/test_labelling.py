import dataclasses

import pytest

from engine.labels.labelling import Labelling

ONE = Labelling(
    teachers=("a" * 64,),
    precisions=("fp16",),
    class_vectors=("b" * 64,),
    weights=(1.0,),
    fusion="none",
    form="features",
    wire="fp16",
    pixels=(224,),
    seed=1,
    crop_scale=0.08,
    rules=1,
    decoder="dali on a gpu",
    corpus="c" * 64,
    block_samples=512,
    class_names=("ant", "bee", "cow"),
)
OTHERS = {
    "teachers": ("d" * 64,),
    "precisions": ("bf16",),
    "class_vectors": ("b" * 63 + "e",),
    "weights": (0.5,),
    "fusion": "mean",
    "form": "logits",
    "wire": "int8",
    "pixels": (336,),
    "seed": 2,
    "crop_scale": 0.5,
    "rules": 2,
    "decoder": "turbojpeg",
    "corpus": "f" * 64,
    "block_samples": 256,
    "class_names": ("ant", "bee"),
}


def test_it_survives_json_and_its_fingerprint_too():
    again = Labelling.from_json(ONE.to_json())
    assert again == ONE and again.fingerprint == ONE.fingerprint and ONE.differences(again) == []
    assert len(ONE.fingerprint) == 16


@pytest.mark.parametrize(("field", "value"), OTHERS.items())
def test_each_thing_makes_another_labelling_and_is_told(field, value):
    other = dataclasses.replace(ONE, **{field: value})
    assert other.fingerprint != ONE.fingerprint
    (line,) = ONE.differences(other)
    assert line.startswith(f"{field}: ") and " here" in line and " there" in line


def test_all_fields_are_told_apart():
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Labelling)}


def test_the_first_class_name_that_differs_is_named():
    other = dataclasses.replace(ONE, class_names=("ant", "wasp", "cow"))
    assert ONE.differences(other) == [
        "class_names: 3 here, 3 there; line 2 is bee here, wasp there"
    ]
    shorter = dataclasses.replace(ONE, class_names=("ant",))
    assert "line 2 is bee here, missing there" in ONE.differences(shorter)[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"teachers": []}', "nonsense"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        Labelling.from_json(text)
