"""Launch files and recipes: shell and YAML parse, and every command of this project in them is one that it takes."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest
import test_cli
import tyro

from allmem_jax.model import config as config_lib
from allmem_jax.model import sharding
from allmem_jax.storage import stores
from train import curriculum, finetune, on_policy, rollout
from train.recipe import FinetuneConfig, read_recipe

yaml = pytest.importorskip("yaml")
ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "configs/launch"
ARGUMENTS = {  # what each program takes, and whether its first argument may be a recipe
    "train.finetune": (finetune.Command, True),
    "train.prepare": (FinetuneConfig, True),
    "train.curriculum": (curriculum.Command, True),
    "train.on_policy": (on_policy.Command, True),
    "train.rollout": (rollout.Command, False),
}


BEFORE = r"(?:srun .*|docker run .*|on_every_host .*|exec |TPU=.*|# +)*"
RUNS = r"(?:(?:[\w./`-]*python|IMAGE) -m (train\.\w+)|(?:sbatch|bash) configs/launch/\S+)"  # those scripts train


def commands(text):
    """(program, its arguments) for every line of a text that runs one of this project."""
    text = re.sub(r"\\\n[ #]*", " ", text)
    for found in re.finditer(rf"^ *{BEFORE}{RUNS}(.*)", text, re.MULTILINE):
        line = re.split(r" #|   | \|\||\",?$|`| &$", found[2])[0]
        yield found[1] or "train.finetune", [word for word in shlex.split(line) if not word.startswith("$")]


def check(module, words):
    assert importlib.util.find_spec(module), module
    if module not in ARGUMENTS:
        return
    kind, takes_recipe = ARGUMENTS[module]
    default = kind()
    if takes_recipe and words[0] in ("RECIPE", "configs/RECIPE.py"):
        words = words[1:]
    elif takes_recipe and not words[0].startswith("-"):
        recipe = read_recipe(str(ROOT / words.pop(0)))
        default = kind(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(FinetuneConfig)})
    tyro.cli(kind, default=default, args=words)


FILES = [
    *sorted(path for path in LAUNCH.iterdir() if path.is_file()),
    *sorted((ROOT / "configs").glob("*.py")),
    ROOT / "train/rollout.py",
    ROOT / "train/on_policy.py",
    ROOT / "README.md",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken(path, capsys):
    try:
        for module, words in commands(path.read_text()):
            check(module, words)
    except SystemExit:
        pytest.fail(f"python -m {module} {shlex.join(words)}\n{capsys.readouterr().err}")


def test_commands_are_found():
    names = ("launch/README.md", "launch/slurm.sbatch", "launch/skypilot.yaml", "launch/tpu_vm.sh", "qwen3_0_6b.py")
    assert [len(list(commands((ROOT / "configs" / name).read_text()))) for name in names] == [5, 2, 1, 2, 3]
    with pytest.raises(SystemExit):
        check("train.rollout", ["--modle", "x"])


def test_image_has_what_it_copies():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {name.removeprefix("./") for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    let_in = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in let_in if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    assert {"train", "serve", "stores", "tpu", "gpu"} <= tomllib.loads((ROOT / "pyproject.toml").read_text())[
        "project"
    ]["optional-dependencies"].keys()


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_shell_parses(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("skypilot*.yaml")), ids=lambda path: path.name)
def test_skypilot_files(path):
    task = yaml.safe_load(path.read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    (command,) = commands(task["run"])
    assert command[0] == "train.finetune"


def test_jobset_has_one_process_a_host_and_a_command_that_is_taken():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"]["parallelism"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert hosts * chips == int(sides[0]) * int(sides[1]) * int(sides[2]) == 64
    assert hosts == job["template"]["spec"]["completions"]
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    ((module, words),) = commands(script)
    assert f"--local-devices={chips}" in words
    check(module, words)


def test_the_server_s_manifest_fits_together_and_its_command_is_taken(monkeypatch):
    documents = list(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text()))
    service, deployment = documents
    assert [each["kind"] for each in documents] == ["Service", "Deployment"]
    template = deployment["spec"]["template"]
    assert (
        service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    )
    (container,) = template["spec"]["containers"]
    (port,), (outer,) = container["ports"], service["spec"]["ports"]
    assert outer["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        each["name"] for each in template["spec"]["volumes"]
    }
    monkeypatch.setattr(stores, "local", pathlib.Path)  # nothing is fetched
    module, name, *words = container["args"][1:]
    given = test_cli.parsed(monkeypatch, name, words)
    assert module == "allmem_jax" and given["port"] == port["containerPort"] and given["host"] == "0.0.0.0"
    assert {container["env"][1]["value"]} == mounted
    assert stores.is_url(given["memories"]) and stores.is_url(given["prefixes"])
    assert container["env"][0]["name"] == "ALLMEM_API_KEY" and template["spec"]["terminationGracePeriodSeconds"] > 20


def test_recipes_fit_the_meshes_of_their_commands():
    devices = {"H100": 1, "v5e-8": 8, "4x4x4": 64}
    seen = 0
    for path in sorted((ROOT / "configs").glob("qwen3*.py")):
        text = re.sub(r"\\\n *", " ", path.read_text())
        for line in re.findall(r"python -m train\.finetune (.*)", text):
            recipe, *words = shlex.split(line.split(" #")[0])
            default = read_recipe(str(ROOT / recipe))
            config = tyro.cli(FinetuneConfig, default=default, args=words)
            number = next((devices[name] for name in devices if name in line), 64)
            shape = sharding.mesh_shape(config.mesh, number)
            config.check_mesh(shape)
            heads = config_lib.preset("qwen3-0.6b" if "0_6b" in path.name else "qwen3-1.7b").n_kv_heads
            assert heads % (shape[2] * shape[3]) == 0
            seen += 1
    assert seen == 7
