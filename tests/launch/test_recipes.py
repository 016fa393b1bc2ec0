"""Do the recipes for clusters call what exists? Without a cluster: Slurm's tools are faked, and files are read."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from stellarbyte_jax.cli import train
from stellarbyte_jax.config import load
from stellarbyte_jax.launch.doctor.versions import DRIVERS

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
JOBSET = ROOT / "scripts" / "kubernetes" / "jobset.yaml"
CONTAINER = ROOT / "scripts" / "container" / "Containerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VARIABLES = ("STELLARBYTE_COORDINATOR", "STELLARBYTE_PROCESSES", "STELLARBYTE_PROCESS")

# Starts its command once for each task, as srun does, and notes its own options; FAKE_STATUS is its status.
SRUN = """
import json, os, signal, subprocess, sys
if os.environ.get("FAKE_TERM"):
    os.kill(os.getppid(), signal.SIGTERM)
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
given = dict(option[2:].partition("=")[::2] for option in options)
tasks = int(given.get("ntasks", os.environ["FAKE_NTASKS"]))
status = 0
for task in range(tasks):
    number = str(task)
    own = {"SLURM_NTASKS": str(tasks), "SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_STEP_NODELIST": "n[0-1]"}
    done = subprocess.run(words, env=os.environ | own, check=False)
    status = max(status, done.returncode)
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(["srun", options, words]) + "\\n")
sys.exit(int(os.environ.get("FAKE_STATUS") or status))
"""
SCONTROL = """
import json, os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n0", "n1", sep="\\n")
else:
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
"""
# Stands for the interpreter: shows what it is told, and leaves the rest to the real one.
PYTHON = """
import os, subprocess, sys
names = ("STELLARBYTE_COORDINATOR", "STELLARBYTE_PROCESSES", "STELLARBYTE_PROCESS", "NCCL_NVLS_ENABLE")
print("ran", sys.argv[1], *(f"{name}={os.environ.get(name)}" for name in names), flush=True)
more = ["--help"] if sys.argv[1].endswith("doctor.py") else []
sys.exit(subprocess.run([sys.executable, *sys.argv[1:], *more], check=False).returncode)
"""


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Runs the script as Slurm would: returns the process, and what the fakes noted."""
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!{sys.executable}\n{program}")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for name in (*VARIABLES, "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    log = tmp_path / "log"

    def run(*words, **variables):
        log.write_text("")
        slurm = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "bin" / "python"),
            "FAKE_LOG": str(log),
            "FAKE_NTASKS": "2",
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "n[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        done = subprocess.run(
            ["bash", str(SBATCH), *words],
            env=os.environ | slurm | variables,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return done, [json.loads(line) for line in log.read_text().splitlines()]

    return run


def test_the_shell_reads_the_script():
    assert subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True).returncode == 0


def linted(*words):
    """A linter of the extra "test", which lies beside this interpreter; its status and what it printed."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    tool = shutil.which(words[0], path=places)
    assert tool is not None, f"{words[0]} is not installed: pip install -e '.[test]'"
    done = subprocess.run([tool, *map(str, words[1:])], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", [SBATCH, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script, tmp_path):
    assert linted("shellcheck", "--norc", "--shell=bash", script) == (0, "")
    bad = tmp_path / script.name
    bad.write_text(script.read_text() + '\nrm -r "$HOME/"$unquoted\n')
    assert "SC2086" in linted("shellcheck", "--norc", "--shell=bash", bad)[1]


def test_hadolint_has_nothing_to_say(tmp_path):
    assert linted("hadolint", "--no-color", CONTAINER) == (0, "")
    bad = tmp_path / "Containerfile"
    bad.write_text(CONTAINER.read_text() + "RUN cd /app && sudo true\n")
    assert "DL3004" in linted("hadolint", "--no-color", bad)[1]


def test_slurm_is_told_what_the_documentation_says():
    text = SBATCH.read_text()
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.MULTILINE))
    assert told["ntasks-per-node"] == told["gpus-per-node"], "a task for each GPU"
    assert told["signal"] == "TERM@300" and "requeue" in told and told["open-mode"] == "append"
    assert "gpus-per-task" not in told and text.index("#SBATCH") < text.index("set -euo")
    commands = text[: text.index("set -euo")].splitlines()
    assert all(line.startswith("#") or not line for line in commands), "Slurm reads no option after a command"


def test_a_job_starts_training_with_what_was_typed(submit):
    words = ("--config", "quickstart", "--set", "output_dir=a b", "--list-settings", "mesh.")
    done, calls = submit(*words)
    assert done.returncode == 0, done.stderr
    ((_, options, command),) = calls
    assert command[1:] == ["scripts/train.py", *words]
    assert {"--kill-on-bad-exit=0", "--gpu-bind=none", "--cpus-per-task=8", "--label"} <= set(options)
    # Slurm's own variables say which process this is.
    ran = "ran scripts/train.py STELLARBYTE_COORDINATOR=None STELLARBYTE_PROCESSES=None STELLARBYTE_PROCESS=None"
    assert done.stdout.count(f"{ran} NCCL_NVLS_ENABLE=0") == 2 and done.stdout.count("mesh.tensor") == 2


def test_a_run_that_ended_by_sigterm_is_requeued_and_no_other(submit):
    for status, requeued in ((143, [["scontrol", "requeue", "4242"]]), (1, []), (2, []), (130, [])):
        done, calls = submit("--config", "quickstart", "--list-settings", "mesh.", FAKE_STATUS=str(status))
        assert (done.returncode, calls[1:]) == (status, requeued)


def test_preemption_that_reaches_the_script_too_waits_for_the_tasks(submit):
    words = ("--config", "quickstart", "--list-settings", "mesh.")
    done, calls = submit(*words, FAKE_TERM="1", FAKE_STATUS="143")
    assert (done.returncode, [call[0] for call in calls]) == (143, ["srun", "scontrol"]), done.stderr


def test_the_doctor_goes_first_where_it_is_asked_for(submit):
    done, calls = submit("--config", "quickstart", "--list-settings", "mesh.", DOCTOR="1", NCCL_NVLS_ENABLE="2")
    assert done.returncode == 0, done.stderr
    doctor, training = calls
    assert "--ntasks-per-node=1" in doctor[1] and training[2][1] == "scripts/train.py"
    for task in range(2):
        named = f"STELLARBYTE_COORDINATOR=n0:24242 STELLARBYTE_PROCESSES=2 STELLARBYTE_PROCESS={task}"
        assert f"ran scripts/doctor.py {named} NCCL_NVLS_ENABLE=2" in done.stdout
    assert "ran scripts/train.py STELLARBYTE_COORDINATOR=None" in done.stdout
    failed, calls = submit("--config", "quickstart", DOCTOR="1", FAKE_STATUS="1")
    assert failed.returncode == 1 and len(calls) == 1, "a fault keeps the run from starting"


@pytest.mark.parametrize(
    ("words", "variables", "part"),
    [
        ((), {}, "no arguments for train.py"),
        (("--config", "x"), {"SLURM_SUBMIT_DIR": "/"}, "submit from the root of a clone"),
        (("--config", "x"), {"PYTHON": "/no/python"}, "set PYTHON"),
    ],
)
def test_what_is_lacking_is_one_line(submit, words, variables, part):
    done, calls = submit(*words, **variables)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1 and not calls


# Fields of jobset.x-k8s.io/v1alpha2 (jobset_types.go), and of batch/v1 and core/v1 as far as they are used.
# A dict is an object, a list an array of what it holds, a type a value, a set one of its members, str: str any map.
CONTAINER_FIELDS = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "ports": [{"containerPort": int, "name": str}],
    "resources": {"requests": {str: (str, int)}, "limits": {str: (str, int)}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": {"Never"},  # what a podFailurePolicy asks for
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "containers": [CONTAINER_FIELDS],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": {"Memory"}, "sizeLimit": str},
        }
    ],
}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob", "Ignore", "Count", "FailIndex"},
                "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}
JOBSET_FIELDS = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [
                {
                    "name": str,
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": [{"PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"}],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check_fields(value, fields, where="JobSet"):
    if isinstance(fields, dict):
        assert isinstance(value, dict), where
        anything = fields.get(str)
        assert anything or not set(value) - set(fields), f"{where}: no field {set(value) - set(fields)}"
        for name, each in value.items():
            check_fields(each, anything or fields[name], f"{where}.{name}")
    elif isinstance(fields, list):
        assert isinstance(value, list) and value, where
        for number, each in enumerate(value):
            check_fields(each, fields[0], f"{where}[{number}]")
    elif isinstance(fields, set):
        assert value in fields, f"{where}: {value} is none of {fields}"
    else:
        assert isinstance(value, fields) and (fields is not int or not isinstance(value, bool)), where


@pytest.fixture
def jobset():
    claim, jobs = yaml.safe_load_all(JOBSET.read_text())
    return claim, jobs


def test_fields_of_the_jobset(jobset):
    _, jobs = jobset
    check_fields(jobs, JOBSET_FIELDS)
    with pytest.raises(AssertionError, match="no field"):
        check_fields({"name": "x", "replica": 1}, JOBSET_FIELDS["spec"]["replicatedJobs"][0])


def test_parts_of_the_jobset_fit_each_other(jobset):
    claim, jobs = jobset
    spec = jobs["spec"]
    (job,) = spec["replicatedJobs"]
    inner = job["template"]["spec"]
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each for each in container["env"]}
    assert spec["coordinator"]["replicatedJob"] == job["name"] and inner["completionMode"] == "Indexed"
    assert str(inner["completions"]) == str(inner["parallelism"]) == environment["STELLARBYTE_PROCESSES"]["value"]
    assert inner["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert set(mounted) == {each["name"] for each in pod["volumes"]} and mounted["shm"] == "/dev/shm"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["kind"] == "PersistentVolumeClaim"
    host, colon, port = environment["STELLARBYTE_COORDINATOR"]["value"].partition(":")
    assert colon and int(port) == container["ports"][0]["containerPort"]
    named = list(environment).index(host.strip("$()"))
    assert named < list(environment).index("STELLARBYTE_COORDINATOR"), "only variables before it are filled in"
    paths = [environment[name]["value"] for name in ("HF_HOME", "JAX_COMPILATION_CACHE_DIR")]
    assert all(Path(path).is_relative_to(mounted["shared"]) for path in paths)
    index = environment["STELLARBYTE_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert set(VARIABLES) <= set(environment)


def test_the_jobset_calls_train_with_arguments_that_it_has(jobset, tmp_path):
    container = jobset[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    *before, python, script = container["command"]
    assert (before, python) == (["tini", "--"], "python") and (ROOT / script).is_file()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *container["args"], "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    options = train._parse(container["args"])
    config = load(options.config, options.set)
    assert config.output_dir.startswith("/shared/") and config.mesh.fsdp == 8
    cores = int(container["resources"]["requests"]["cpu"])
    assert config.data.workers < cores and container["resources"]["limits"]["nvidia.com/gpu"] == config.mesh.fsdp


def instructions():
    """Those of the Containerfile, as (word, rest), continued lines joined."""
    text = re.sub(r"^#.*\n", "", CONTAINER.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_each_line_of_the_containerfile():
    found = instructions()
    words = [word for word, _ in found]
    assert set(words) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    assert words[0] == "ARG" and found[1] == ("FROM", "${BASE}") and words.count("FROM") == 1
    name, tag = arguments["BASE"].split(":")
    assert "/" not in name and re.fullmatch(r"3\.1[123]\.\d+-[a-z-]+", tag), "pinned, and of no named host"
    assert arguments["EXTRA"] in PROJECT["optional-dependencies"]
    for word, rest in found:
        if word == "COPY":
            *sources, target = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
            assert len(sources) == 1 or target.endswith("/")
    used = set(re.findall(r"\$\{(\w+)\}", CONTAINER.read_text()))
    assert used == set(arguments)
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN"), "what follows is not root"
    assert dict(found)["USER"] == "1000"


def test_what_the_container_holds_is_what_it_needs():
    """The package's metadata, its shipped files, and the script that is run."""
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "stellarbyte_jax", "scripts"} <= set(copied)
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["package-dir"].values()) <= set(copied)
    kept = (CONTAINER.parent / "Containerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} == {line for line in kept if line.startswith("!")}
    program = json.loads(dict(instructions())["CMD"])
    assert program[0] == "python" and (ROOT / program[1]).is_file()
    assert json.loads(dict(instructions())["ENTRYPOINT"]) == ["tini", "--"]


def test_the_page_names_files_and_commands_that_exist():
    text = (ROOT / "docs" / "clusters.md").read_text()
    for path in re.findall(r"(?:scripts|stellarbyte_jax)/[\w/.-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((\w+\.md)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    for major, branch in DRIVERS.items():
        assert f"cuda{major}" in PROJECT["optional-dependencies"] and f"{branch} or later" in text
    assert all(name in text for name in VARIABLES)
    commands = [shlex.split(line) for line in re.findall(r"^(?:docker build|kubectl apply).*$", text, re.MULTILINE)]
    assert all((ROOT / words[words.index("-f") + 1]).is_file() for words in commands) and len(commands) == 3
