"""Learning studies: what is to be run, read from YAML, and what has been run, one line of JSON each."""

import fcntl
import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

POLICIES = {"dppo": "DiffusionMlpPolicy", "ppo": "MlpPolicy", "sac": "MlpPolicy", "random": ""}
Count = Field(ge=1)


class Strict(BaseModel):
    """Fields of YAML, of which none may be misspelt."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Pretraining(Strict):
    """
    How policies learn from demonstrations, one for each env and seed, which all algorithms begin with that name it.

    :param demonstrations: By env, a bundled set's name or a file in the folder of the command line.
    :param epochs: Passes over the demonstrations.
    :param policy: Policy.
    :param policy_kwargs: What its constructor takes; default: the paper's for MLPs.
    :param arguments: Arguments of BC.
    """

    demonstrations: dict[str, str]
    epochs: int = Count
    policy: str = "DiffusionMlpPolicy"
    policy_kwargs: dict[str, Any] | None = None
    arguments: dict[str, Any] = {}


class Steering(Strict):
    """
    How a pre-trained policy that stays as it is becomes a part of the env.

    :param wrapper: "noise" (``NoiseSpaceVecEnv``) or "residual" (``ResidualVecEnv``).
    :param arguments: What its constructor takes beside the envs and the policy.
    """

    wrapper: Literal["noise", "residual"]
    arguments: dict[str, Any] = {}


class Algorithm(Strict):
    """
    One of a study's algorithms.

    :param algo: "dppo", "ppo", "sac" or "random", actions that are drawn uniformly.
    :param policy: Policy; default: the MLP policy of the algorithm.
    :param settings: "defaults" of the constructor, or "zoo": the env's entry in the YAML for RL Zoo, that for fine-tuning
        where there is a pre-training.
    :param pretraining: The name of the pre-training whose policies it begins with or steers; default: from scratch.
    :param steering: How it steers them.
    :param arguments: Arguments of the constructor or, with "zoo", what replaces values of the entry.
    :param zoo_env: By env, whose entry to take instead of its own.
    """

    algo: Literal["dppo", "ppo", "sac", "random"]
    policy: str | None = None
    settings: Literal["defaults", "zoo"] = "defaults"
    pretraining: str | None = None
    steering: Steering | None = None
    arguments: dict[str, Any] = {}
    zoo_env: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Algorithm":
        if self.settings == "zoo" and (self.algo == "random" or self.policy is not None):
            raise ValueError("settings: zoo goes neither with algo: random nor with policy, which the entry has; remove one.")
        if self.steering is not None and (self.algo != "sac" or self.settings == "zoo" or self.pretraining is None):
            raise ValueError("steering goes with algo: sac, settings: defaults and a pretraining; change these or remove it.")
        if self.pretraining is not None and self.steering is None and (self.algo != "dppo" or self.policy is not None):
            raise ValueError("pretraining goes neither without algo: dppo nor with policy, which it has itself; remove one.")
        if self.zoo_env and self.settings != "zoo":
            raise ValueError("zoo_env has no effect without settings: zoo; add that or remove zoo_env.")
        return self


class Override(Strict):
    """
    What is different for an env.

    :param steps: As in :class:`Study`, as are the others.
    :param arguments: By algorithm, arguments that are added to its own.
    """

    steps: int | None = Field(default=None, ge=1)
    evaluations: int | None = Field(default=None, ge=1)
    eval_episodes: int | None = Field(default=None, ge=1)
    final_eval_episodes: int | None = Field(default=None, ge=1)
    arguments: dict[str, dict[str, Any]] = {}


class Run(Strict):
    """One training: everything that it depends on but the versions of the packages."""

    study: str
    env: str
    algorithm: str
    algo: str
    policy: str
    settings: str
    pretraining: dict[str, Any] | None
    steering: dict[str, Any] | None = None
    arguments: dict[str, Any]
    steps: int
    seed: int
    evaluations: int
    eval_episodes: int
    final_eval_episodes: int

    @property
    def hash(self) -> str:
        """Changes with the algorithm's arguments, the number of steps, the pre-training and how that is steered."""
        parts = [self.algo, self.policy, self.settings, self.arguments, self.steps]
        return digest([*parts, *(part for part in (self.pretraining, self.steering) if part is not None)])

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What is done once."""
        return self.env, self.algorithm, self.seed, self.hash

    def __str__(self) -> str:
        return f"{self.env}/{self.algorithm}, seed {self.seed}"


def digest(value: Any) -> str:
    """A short text that changes with what is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Study(Strict):
    """
    A study: every algorithm in every env with every seed.

    :param name: Name, that of its file.
    :param envs: Ids of envs.
    :param algorithms: Algorithms by name.
    :param steps: Env steps of a training.
    :param seeds: Seeds.
    :param evaluations: Number of evaluations, evenly spaced, the last at the end.
    :param eval_episodes: Episodes of each of them but the last.
    :param final_eval_episodes: Episodes of the last one.
    :param baseline: The algorithm that others are compared with.
    :param pretraining: Pre-trainings by name.
    :param env_overrides: What is different, by env.
    """

    name: str
    envs: list[str] = Field(min_length=1)
    algorithms: dict[str, Algorithm] = Field(min_length=1)
    steps: int = Count
    seeds: list[int] = Field(min_length=1)
    evaluations: int = Count
    eval_episodes: int = Count
    final_eval_episodes: int = Count
    baseline: str | None = None
    pretraining: dict[str, Pretraining] = {}
    env_overrides: dict[str, Override] = {}

    @model_validator(mode="after")
    def _known_names(self) -> "Study":
        algorithms = list(self.algorithms)
        named = {
            "baseline": ([self.baseline] if self.baseline is not None else [], algorithms),
            "env_overrides": (list(self.env_overrides), self.envs),
        }
        for env, override in self.env_overrides.items():
            named[f"env_overrides.{env}.arguments"] = (list(override.arguments), algorithms)
        for name, algorithm in self.algorithms.items():
            named[f"algorithms.{name}.zoo_env"] = (list(algorithm.zoo_env), self.envs)
            if algorithm.pretraining is not None:
                named[f"algorithms.{name}.pretraining"] = ([algorithm.pretraining], list(self.pretraining))
        for name, pretraining in self.pretraining.items():
            named[f"envs, of which pretraining.{name}.demonstrations has all"] = (self.envs, list(pretraining.demonstrations))
        for field, (values, known) in named.items():
            for value in values:
                if value not in known:
                    raise ValueError(f"{field}: {value!r} is not in the study; it has {', '.join(known) or 'none'}.")
        for field in ("envs", "seeds"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} names one twice: {values}; remove it.")
        return self

    @property
    def random(self) -> str | None:
        """The name of the random policy, if it is in the study."""
        return next((name for name, algorithm in self.algorithms.items() if algorithm.algo == "random"), None)

    def runs(self) -> list[Run]:
        """All runs, seeds outermost, so that there is something of every env early."""
        return [self._run(env, name, seed) for seed in self.seeds for env in self.envs for name in self.algorithms]

    def _run(self, env: str, name: str, seed: int) -> Run:
        algorithm = self.algorithms[name]
        override = self.env_overrides.get(env, Override())
        numbers = {
            field: getattr(override, field) or getattr(self, field)
            for field in ("steps", "evaluations", "eval_episodes", "final_eval_episodes")
        }
        if algorithm.algo == "random":
            numbers.update(steps=0, evaluations=1)
        arguments = {**algorithm.arguments, **override.arguments.get(name, {})}
        pretraining = None
        if algorithm.pretraining is not None:
            pretraining = self.pretraining[algorithm.pretraining].model_dump()
            pretraining["demonstrations"] = pretraining["demonstrations"][env]
        if algorithm.settings == "zoo":
            file = f"{algorithm.algo}{'' if pretraining is None else '_finetune'}.yml"
            entry = zoo_entry(file, algorithm.zoo_env.get(env, env), f"algorithms.{name}.zoo_env")
            arguments = {**entry, **arguments}
        policy = algorithm.policy or arguments.get("policy", POLICIES[algorithm.algo])
        if pretraining is not None and algorithm.steering is None:
            policy = pretraining["policy"]
        return Run(
            study=self.name,
            env=env,
            algorithm=name,
            algo=algorithm.algo,
            policy=policy,
            settings=algorithm.settings,
            pretraining=pretraining,
            steering=None if algorithm.steering is None else algorithm.steering.model_dump(),
            arguments=arguments,
            seed=seed,
            **numbers,
        )


def zoo_entry(file: str, env: str, field: str) -> dict[str, Any]:
    """
    :param file: "dppo.yml", "dppo_finetune.yml" or "ppo.yml".
    :param env: The entry's env.
    :param field: The study's field that chooses another one, for the error.
    :return: The entry in the packaged YAML for RL Zoo, without the number of steps, which is the study's.
    """
    if file.startswith("dppo"):
        from sb3_dppo.zoo import HYPERPARAMS

        path = HYPERPARAMS / file
    else:
        spec = find_spec("rl_zoo3")
        assert spec is not None and spec.submodule_search_locations, "rl_zoo3 is not installed"
        path = Path(spec.submodule_search_locations[0]) / "hyperparams" / file
    entries = yaml.safe_load(path.read_text("utf-8"))
    if env not in entries:
        raise ValueError(
            f"{field}: RL Zoo's {path.name} has no entry for {env!r}; name another env's there, or give arguments without "
            f"settings: zoo. Entries: {', '.join(entries)}"
        )
    return {name: value for name, value in entries[env].items() if name != "n_timesteps"}


def read_study(path: Path) -> Study:
    """
    :param path: YAML file.
    :return: The study.
    :raises ValueError: that names field, value and what may be there instead.
    """
    content = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {content!r} is not a study; a mapping with {_fields(Study)} is.")
    try:
        return Study(name=path.stem, **{str(field): value for field, value in content.items() if field != "name"})
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_explained(problem)}" for problem in error.errors())) from None


def _fields(model: type[BaseModel]) -> str:
    """The fields that a user may write."""
    return ", ".join(field for field in model.model_fields if field != "name")


def _explained(problem: Any) -> str:
    """The problem with field, value and way out."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"algorithms": Algorithm, "env_overrides": Override, "pretraining": Pretraining}
        model = models.get(str(problem["loc"][0]), Study)
        return f"{place}: there is no such field (value {problem['input']!r}); there are {_fields(model)}."
    if problem["type"] == "missing":
        return f"{place}: this field is missing; add it."
    value = "" if isinstance(problem["input"], dict) else f"{problem['input']!r} is wrong here. "
    return f"{place}{': ' if place else ''}{value}{problem['msg'].removeprefix('Value error, ')}"


def results_file(study: Study, folder: Path) -> Path:
    """Where a study's results are."""
    return folder / f"{study.name}.jsonl"


def read_results(path: Path) -> list[dict[str, Any]]:
    """
    :param path: File of results, which may be missing.
    :return: Its lines.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}, is not JSON: {line[:80]!r}; remove it to run it again.") from None
    return rows


def key_of(row: dict[str, Any]) -> tuple[str, str, int, str]:
    """``Run.key`` of a line of results."""
    return row["env"], row["algorithm"], row["seed"], row["hash"]


def append_result(path: Path, row: dict[str, Any]) -> None:
    """
    Add a line in one piece, however many processes do so.

    :param path: File of results.
    :param row: The line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, default=str) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line)
        os.fsync(file.fileno())
