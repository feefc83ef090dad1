"""engine.config and jobs.cli: one parser for TOML and flags, one screen for what is wrong."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from engine.config import RunConfig, Section, UserError, absolute, to_dict
from engine.config_pretrain import PretrainConfig
from engine.parse import Flat, parse
from jobs.cli import COMMANDS, PRESETS, main, run

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "jobs" / "configs" / "quickstart").glob("*.toml"))
SCHEMAS = {"distill": RunConfig, "pretrain": PretrainConfig}
GOOD = 'name = "a"\noverwrite = true\n[train]\nlr = 0.25\npasses = 3\n[student]\nworkers = 2\n'


@dataclasses.dataclass(frozen=True)
class Asked(Section):
    """The shape of a command's config: the run's fields, and one of its own."""

    run: Flat[RunConfig]
    dry_run: bool = False


def run_config(*words: str) -> RunConfig:
    return parse(Asked, words, prog="promptkd distill", from_files=True).run


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str, name: str = "run.toml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]):
    """complaint(*words): what `promptkd distill` says of them on stderr, ending in exit code 2."""

    def ask(*words: str) -> str:
        try:
            code = main(["distill", *words])
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        assert code == 2, told
        assert told.out == "" and "Traceback" not in told.err
        return " ".join(told.err.replace("│", " ").split())

    return ask


def test_toml_fills_nested_fields(toml):
    config = run_config(toml(GOOD))
    assert config.train.lr == 0.25 and config.train.passes == 3 and config.student.workers == 2
    assert config.overwrite is True and config.name == "a"
    assert config.train.batch == 256  # a default


def test_later_words_win(toml):
    file, other = toml(GOOD), toml('name = "b"\n[train]\nlr = 0.5\n', "other.toml")
    assert run_config(file, "--train.lr", "1e-3").train.lr == 1e-3
    assert run_config(file, "--train.lr=0.1", "--train.lr", "0.2").train.lr == 0.2
    both = run_config(file, other)
    assert (both.name, both.train.lr, both.train.passes) == ("b", 0.5, 3)
    assert run_config("--name", "c", file).name == "c"  # files come first, wherever they stand


def test_bools_in_toml_go_both_ways(toml):
    yes, no = (
        toml('name = "a"\noverwrite = true\n'),
        toml('name = "a"\noverwrite = false\n', "n.toml"),
    )
    assert run_config(yes).overwrite and not run_config(no).overwrite
    assert not run_config(yes, no).overwrite and run_config(no, yes).overwrite
    assert not run_config(yes, "--no_overwrite").overwrite
    assert parse(Asked, [toml('name = "a"\ndry_run = true\n')], prog="p", from_files=True).dry_run


def test_toml_words_with_blanks_and_dashes_stay_whole(toml):
    config = run_config(toml('name = "a b"\n[classes]\ntemplate = "a -- {}, \'odd\' --seed 3."\n'))
    assert config.name == "a b" and config.seed == 1
    assert config.classes.template == "a -- {}, 'odd' --seed 3."


def test_a_run_s_own_record_is_read_back(tmp_path: Path):
    """to_dict() as a JSON file makes the same config."""
    config = run_config(
        "--name", "a", "--overwrite", "--train.lr", "0.1", "--classes.template", "{}"
    )
    (tmp_path / "run.json").write_text(json.dumps(to_dict(config)))
    assert run_config(str(tmp_path / "run.json")) == config


def test_numbers_survive_toml_exactly(toml):
    text = f'name = "a"\nseed = {2**63 - 1}\n[train]\nlr = 1e-7\nweight_decay = 0.1\n'
    config = run_config(toml(text))
    assert (config.seed, config.train.lr, config.train.weight_decay) == (2**63 - 1, 1e-7, 0.1)


WRONG = {  # TOML: what the message has to name
    "[train]\nnonsense = 1": "train.nonsense: there is no such field",
    "[trian]\nlr = 1.0": "trian.lr: there is no such field; is it train.lr?",
    "train = 3": "train is a section: [train]",
    "[train]\nno_lr = 1": "train.no_lr: there is no such field",
    "help = true": "help: there is no such field",
    "[teacher]\ngpus = -1": "teacher.gpus = -1 is of an older version: leave it out",
    "[prompts]\ndepth = 3": "prompts.depth is a field of `promptkd pretrain`",
    '[teacher.model]\nname = "a"': "teacher.model is a field, and not a section",
    '[train]\nlr = "fast"': "--train.lr",
    "[train]\npasses = 1.5": "--train.passes",
    "[train]\npasses = true": "--train.passes",
    "[student]\nzero_stage = 7": "--student.zero_stage",
    '[targets]\nsource = "storage"': "--targets.source",
    '[teacher]\nprecision = "fp4"': "--teacher.precision",
    '[student]\nprecision = "fp8"': "--student.precision",
    "[teacher]\nmax_kl = -0.1": "teacher.max_kl must be at least 0, got -0.1",
    "[train]\nlr = 0.0": "train.lr must be greater than 0, got 0.0",
    "[train]\nlr = nan": "train.lr must be greater than 0, got nan",
    "[train]\ncrop_scale = 1.01": "train.crop_scale must be greater than 0 and at most 1, got 1.01",
    "[train]\nwarmup_steps = -1": "train.warmup_steps must be at least 0, got -1",
    "[corpus]\nblock_samples = 0": "corpus.block_samples must be at least 1 and at most 65536",
    "[corpus]\nblock_samples = 65537": "corpus.block_samples must be at least 1 and at most 65536",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_toml_names_field_and_file(toml, complaint, text: str):
    file = toml('name = "a"\n' + text)
    message = complaint(file)
    assert WRONG[text] in message
    assert file in message.replace(" ", "")  # however it is wrapped


WRONG_STUDENT = {  # TOML of [student] and [train]: what the message has to name
    '[student]\ntrainable = "tower"': "student.trainable must be prompts, full or last:K",
    '[student]\ntrainable = "last:0"': "student.trainable must be prompts, full or last:K",
    '[student]\ntrainable = "last"': "student.trainable must be prompts, full or last:K",
    '[student]\ntrainable = "full:2"': "student.trainable must be prompts, full or last:K",
    '[student]\ntrainable = "full"\nprecision = "fp16"': "student.precision: fp16 is for frozen",
    "[student]\noffload = true\nzero_stage = 0": "student.offload needs student.zero_stage",
    "[train]\nkd_weight = 0.0": "train.feature_weight are all 0",
    "[train]\ncosine_weight = -1.0": "train.cosine_weight must be at least 0",
    '[train]\nfeature = "l2"': "--train.feature",
}


@pytest.mark.parametrize("text", WRONG_STUDENT)
def test_what_cannot_be_trained_names_the_field(toml, complaint, text: str):
    assert WRONG_STUDENT[text] in complaint(toml('name = "a"\n' + text))


def test_what_is_trained_is_told_in_layers(toml):
    for text, layers in (("prompts", 0), ("last:2", 2), ("last:12", 12), ("full", None)):
        config = run_config(toml(f'name = "a"\n[student]\ntrainable = "{text}"\noffload = true\n'))
        assert config.student.trained_layers == layers and config.student.offload
    alone = run_config("--name", "a", "--train.kd_weight", "0", "--train.feature_weight", "2")
    assert alone.train.kd_weight == 0


WRONG_RUN = {  # on the run itself: cross-field and top-level errors
    "seed = -1": "seed must be at least 0",
    'name = ""': "name must be a plain folder name",
    'name = "../a"': "name must be a plain folder name",
    'name = ".."': "name must be a plain folder name",
    'device = "tpu"': "--device",
    "[train]\nbatch = 6": "train.batch (6) must be a multiple of corpus.lanes (4)",
    "[student]\nworkers = 3": "corpus.lanes (4) must be a multiple of student.workers (3)",
    "[teacher]\nactors = 3\nmax_actors = 2": "teacher.max_actors (2) is less than teacher.actors",
    '[targets]\nsource = "store"': "targets.store: targets.source is store, so it must name one",
}


def with_name(text: str) -> str:
    return text if text.startswith("name") else 'name = "a"\n' + text


@pytest.mark.parametrize("text", WRONG_RUN)
def test_a_run_that_does_not_fit_together_names_the_field(toml, complaint, text: str):
    assert WRONG_RUN[text] in complaint(toml(with_name(text)))


@pytest.mark.parametrize("text", ["seed = -1", "[train]\nbatch = 6"])
def test_a_run_that_does_not_fit_together_names_the_file(toml, complaint, text: str):
    file = toml(with_name(text))
    assert file in complaint(file)


@pytest.mark.parametrize("value", ['"yes"', "1", "[]"])
def test_a_bool_that_is_none_names_its_field(toml, complaint, value: str):
    assert "overwrite" in complaint(toml(f'name = "a"\noverwrite = {value}\n'), "--dry_run")


@pytest.mark.parametrize("value", ["[0.1]", '"0.1"'])
def test_a_number_in_other_clothes_is_refused(toml, complaint, value: str):
    assert "train.lr" in complaint(toml(f'name = "a"\n[train]\nlr = {value}\n'), "--dry_run")


def test_a_value_may_look_like_a_file_or_a_flag(toml):
    file = toml('name = "-x"\n')
    config = run_config("--classes.names", "names.json", file)
    assert config.classes.names == "names.json" and config.name == "-x"
    assert run_config(file, "--classes.names", file).classes.names == file
    assert parse(Asked, ["--dry-run", file], prog="p", from_files=True).dry_run


def test_infinity_is_no_learning_rate(complaint):
    assert "train.lr" in complaint("--name", "a", "--train.lr", "inf", "--dry_run")


def test_wrong_flags_name_themselves(complaint):
    assert "--train.lr" in complaint("--name", "a", "--train.lr", "fast")
    assert "--trian.lr" in complaint("--name", "a", "--trian.lr", "1")
    assert "--name" in complaint("--train.lr", "1")
    assert "train.lr must be greater than 0" in complaint("--name", "a", "--train.lr", "-1")


def test_a_file_that_cannot_be_read_is_named(toml, complaint, tmp_path: Path):
    missing = str(tmp_path / "none.toml")
    assert f"{missing}: no such file" in complaint(missing)
    broken = toml("[train\nlr = 1\n")
    assert f"{broken}: cannot be read" in complaint(broken)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
    assert f"{tmp_path / 'latin.toml'}: cannot be read" in complaint(str(tmp_path / "latin.toml"))


def test_a_folder_is_no_toml_file(complaint, tmp_path: Path):
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in complaint(str(tmp_path / "folder.toml"))


def test_bounds_hold_in_python_too():
    """A config built in code is checked as one that is parsed."""
    good = RunConfig(name="a")
    with pytest.raises(UserError, match=r"train\.batch \(258\)"):
        dataclasses.replace(good, train=dataclasses.replace(good.train, batch=258))
    with pytest.raises(UserError, match=r"^teacher\.batch must be at least 1 "):
        dataclasses.replace(good.teacher, batch=0)
    assert dataclasses.replace(good.teacher, batch=65536).batch == 65536


def test_views_follow_passes_unless_given():
    assert run_config("--name", "a", "--train.passes", "7").views == 7
    assert run_config("--name", "a", "--train.views", "2").views == 2
    assert run_config("--name", "a", "--runs_dir", "/r").folder == Path("/r/a")


def test_to_dict_is_json_and_complete():
    config = RunConfig(name="a")
    told = to_dict(config)
    assert json.loads(json.dumps(told)) == told
    assert told["train"]["lr"] == 0.005 and told["name"] == "a"
    assert set(told) == {f.name for f in dataclasses.fields(RunConfig)}


def test_absolute_makes_paths_mean_the_same_elsewhere(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("teacher.pt").touch()
    words = ["--name", "a", "--corpus.shards", "d/*.tar", "--corpus.evaluation", "s3://b/c"]
    words += ["--teacher.weights", "teacher.pt", "--student.weights", "openai"]
    words += ["--teacher.model", "ViT-L-14", "--student.model", "local-dir:m"]
    config = absolute(run_config(*words))
    assert config.corpus.shards == f"{tmp_path}/d/*.tar"
    assert config.corpus.evaluation == "s3://b/c"
    assert config.runs_dir == f"{tmp_path}/runs"
    assert config.classes.names == ""
    assert (config.teacher.weights, config.student.weights) == (f"{tmp_path}/teacher.pt", "openai")
    assert (config.teacher.model, config.student.model) == ("ViT-L-14", f"local-dir:{tmp_path}/m")
    assert config.name == "a" and absolute(config) == config
    both = absolute(run_config("--name", "a", "--corpus.shards", "a/{0..9}.tar::https://h/x.tar"))
    assert both.corpus.shards == f"{tmp_path}/a/{{0..9}}.tar::https://h/x.tar"
    braces = absolute(run_config("--name", "a", "--corpus.shards", "{/m/a,b}/{0..9}.tar"))
    assert braces.corpus.shards.split("::")[::10] == ["/m/a/0.tar", f"{tmp_path}/b/0.tar"]
    Path("c::d").mkdir()
    odd = absolute(run_config("--name", "a", "--corpus.shards", "c::d"))
    assert odd.corpus.shards == f"{tmp_path}/c::d"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_our_own_configs_parse(file: Path):
    """A file is named after the command that it is for."""
    words = [str(file), "--name", "a"]
    config = parse(SCHEMAS[file.stem], words, prog="p", from_files=True)
    assert config.name == "a" and config.device == "cpu"


def test_our_own_configs_are_found():
    assert [file.stem for file in CONFIGS] == sorted(SCHEMAS)


@pytest.mark.parametrize(("command", "schema"), SCHEMAS.items(), ids=SCHEMAS)
def test_every_preset_has_a_file_or_is_the_defaults(command: str, schema: type):
    names = get_args(get_type_hints(schema)["preset"])
    files = sorted(file.stem for file in (PRESETS / command).iterdir())
    assert sorted(names[1:]) == files  # the first is what the fields' defaults are
    told = {}
    for name in names:
        config = parse(
            schema,
            ["--name", "a", "--preset", name],
            prog="p",
            from_files=True,
            presets=PRESETS / command,
        )
        assert config.preset == name
        told[name] = json.dumps(to_dict(config) | {"preset": ""})
    assert len(set(told.values())) == len(names)


def preset(*words: str) -> RunConfig:
    where = PRESETS / "distill"
    return parse(RunConfig, ["--name", "a", *words], prog="p", from_files=True, presets=where)


def test_a_preset_lies_under_the_file_and_the_command_line(toml):
    file = toml('preset = "paper"\n[train]\nlr = 0.25\n')
    config = preset(file, "--train.passes", "7")
    assert (config.train.batch, config.train.lr, config.train.passes) == (8, 0.25, 7)
    assert preset(file, "--preset=fast").train.batch == 256
    assert preset("--preset", "paper-xd").student.depth == 3


def test_the_papers_preset_is_the_papers_recipe():
    """Table 1.5 of the recipe: batch 8, SGD 0.005, stepped by epoch, 20 epochs, weight 1000."""
    config = preset("--preset", "paper")
    train, student = config.train, config.student
    assert (train.passes, config.views, train.batch, train.lr, train.lr_batch) == (
        20,
        20,
        8,
        0.005,
        8,
    )
    assert (train.optimizer, train.weight_decay, train.schedule) == ("sgd", 5e-4, "epochs")
    assert (train.kd_weight, train.reduction, train.temperature) == (1000, "paper", 1)
    assert (train.crop_scale, train.selection) == (0.08, "paper")
    assert (student.prompts, student.depth, student.projector_width) == (4, 9, 0)
    assert student.trainable == "prompts" and train.cosine_weight == train.feature_weight == 0


def test_the_presets_of_stage_one_are_the_references():
    def told(name: str) -> PretrainConfig:
        words = ["--name", "a", "--preset", name]
        where = PRESETS / "pretrain"
        return parse(PretrainConfig, words, prog="p", from_files=True, presets=where)

    src = told("promptsrc")
    assert (src.prompts.text, src.prompts.vision, src.prompts.depth) == (4, 4, 9)
    assert (src.train.passes, src.train.batch, src.train.lr) == (20, 8, 0.005)
    assert (src.train.text_weight, src.train.image_weight) == (25, 10)
    assert (src.train.average_mean, src.train.average_std) == (15, 1)
    assert (src.corpus.shots, src.corpus.classes) == (16, "base")
    xd, maple = told("promptsrc-xd"), told("maple")
    assert (xd.prompts.depth, xd.train.average_mean, xd.train.average_std) == (3, 6, 10)
    assert xd.corpus.classes == "all"
    assert (maple.prompts.method, maple.prompts.text, maple.prompts.vision) == ("maple", 2, 2)
    assert (maple.train.passes, maple.train.batch, maple.train.lr) == (5, 4, 0.0035)


HEAVY = {"torch", "torchvision", "ray", "open_clip", "deepspeed", "nvidia", "triton", "pyarrow"}


@pytest.mark.parametrize(
    "words", [["--help"], ["distill", "--help"], ["pretrain", "--help"]], ids=" ".join
)
def test_help_is_quick(words: list[str]):
    """It exits with 0, tells of its options, and imports nothing that takes seconds."""
    code = (
        "import sys\nfrom jobs.cli import main\ntry:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print(code, *{name.partition('.')[0] for name in sys.modules}, sep='\\n')"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = told.stdout.splitlines()
    assert ("0" in lines and "tyro" in lines[lines.index("0") :]) or words == ["--help"]
    assert not HEAVY & set(lines[lines.index("0") :])
    assert all(name in told.stdout for name in (["--train.lr"] if len(words) > 1 else COMMANDS))


def test_every_wrong_field_of_a_file_is_named_at_once(toml, complaint):
    """Also where a run's own record, which tells more than settings, is given as a file."""
    message = complaint(toml('name = "a"\nlr = 0.1\n[trian]\nlr = 1\n[teacher]\ngpus = -1\n'))
    assert message.count("run.toml: ") == 3
    record = toml('{"name": "a", "git_sha": null, "lives": [{"wall_s": 1}]}', "config.json")
    message = complaint(record)
    assert "lives: a run tells this of itself" in message and "older version" not in message


def test_an_unknown_command_is_refused(capsys):
    assert main(["xyz"]) == 2
    told = capsys.readouterr().err
    assert "xyz" in told and all(name in told for name in COMMANDS)
    assert main([]) == 0


@pytest.mark.parametrize(
    "word, meant",
    [("destil", "distill"), ("evaluation", "evaluate"), ("my.toml", "distill my.toml")],
)
def test_an_unknown_command_has_its_nearest_proposed(capsys, word: str, meant: str):
    assert main([word]) == 2
    told = capsys.readouterr().err
    assert f"no command {word!r}; is it `promptkd {meant}`?" in told and len(told.splitlines()) == 1


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"promptkd {version('promptkd-engine')}\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_a_way_on(capsys, code: int):
    """Python names no file where a write, and not an open, has failed."""

    def command(words: Sequence[str]) -> None:
        raise OSError(int(words[0]), os.strerror(int(words[0])))

    assert run(command, [str(code)], "distill") == 2
    told = capsys.readouterr().err
    assert os.strerror(code) in told and "--resume" in told
    with pytest.raises(OSError):  # another one without a file is for the programmer
        run(command, [str(errno.EBADF)], "distill")
