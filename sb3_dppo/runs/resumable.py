"""What an algorithm needs to survive: a run that is watched while it learns, and models that go on where they were saved."""

import io
import pathlib
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

import sb3_dppo.ranks as ranks
from sb3_dppo.runs.checkpoints import RunState
from sb3_dppo.runs.faults import EnvGuard, changes_numbers, check_finite, interruptible
from sb3_dppo.runs.files import atomic_write
from sb3_dppo.runs.names import constructor_arguments, refuse_unknown

SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")


class ResumableAlgorithm(OnPolicyAlgorithm):
    """
    An on-policy algorithm whose files go on exactly, and whose runs end with a clear message whatever happens.

    A subclass has the attributes ``on_bad_env``, ``n_bad_env_resets``, ``reward_scaler`` (with ``forget_episodes(n_envs)``),
    ``n_rollouts``, ``pretrained_on_demonstrations`` and the class attribute ``policy_aliases``, and its policy ``optimizers``,
    ``generator`` and ``seed(seed)``. Its constructor calls :meth:`_init_run`, its ``collect_rollouts`` begins with
    :meth:`_begin_rollout` and calls :meth:`_check_step` after each env step, and its ``train`` begins with
    :meth:`_begin_update`.
    """

    reward_scaler: Any
    policy: Any  # type: ignore[assignment]

    def _init_run(self) -> None:
        # The start of the rollout under way, from which a file that is saved now goes on.
        self._rollout_start: RunState | None = None
        # In files, and in a model that was loaded from one, until it learns.
        self._run_state: RunState | None = None
        # Env steps before the call of ``learn``, or before the first one of a run that was interrupted.
        self._start_of_run = 0

    def _configure_sampler(self) -> None:
        """Let the policy sample as the model's settings say."""

    def _check_before_learning(self) -> None:
        """Check what only matters for training: a loaded model may have another number of envs, or never be trained."""

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the generators of Python, NumPy, PyTorch, the env, the action space and the policy.

        :param seed: The seed; ``None`` leaves everything as it is.
        """
        super().set_random_seed(seed)
        if seed is None:
            return
        if hasattr(self, "policy"):
            self.policy.seed(seed)
        if self.env is not None and ranks.rank() > 0:
            self.env.seed(seed + ranks.rank() * self.n_envs)

    def learn(
        self: SelfResumable,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfResumable:
        """
        Return a trained model.

        :param total_timesteps: Env steps to train on, a lower bound: rollouts are completed
        :param callback: Callback(s) called at every env step with state of the algorithm
        :param log_interval: Rollouts between two logs
        :param tb_log_name: The name of the run for TensorBoard logging
        :param reset_num_timesteps: Whether to reset the number of timesteps, used in logging and schedules
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        :raises ValueError: for settings that can't be trained with, or an env that returns NaN
        """
        if not (isinstance(total_timesteps, (int, float, np.number)) and np.isfinite(total_timesteps)):
            raise ValueError(f"total_timesteps={total_timesteps!r} must be a finite number.")
        if self.env is None:
            raise ValueError("The model has no env to learn in: load it with load(path, env=env), or call set_env(env).")
        self._check_before_learning()
        with ranks.watched(), interruptible(self._describe_interruption), EnvGuard(self):
            super().learn(int(total_timesteps), callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        if ranks.size() > 1:  # The first rank saves the states of all, which it can't ask for then.
            self._rollout_start = RunState.of_all(self)
        return self

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Learn in this env from now on, see ``BaseAlgorithm.set_env``.

        :param env: The env, or its id
        :param force_reset: Force a call to ``reset()`` before training
        """
        super().set_env(maybe_make_env(env, verbose=0), force_reset)

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log. Means over episodes are of those of all ranks.

        :param iteration: Current logging iteration
        """
        own = self.ep_info_buffer, self.ep_success_buffer
        if ranks.size() > 1:
            self.ep_info_buffer, self.ep_success_buffer = (
                deque(chain(*parts)) for parts in zip(*ranks.gather(own), strict=True)
            )
        super().dump_logs(iteration)
        self.ep_info_buffer, self.ep_success_buffer = own

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        run_state, self._run_state, self._rollout_start = self._run_state, None, None
        if ranks.rank() > 0:  # The first one tells.
            self.verbose, self.tensorboard_log = 0, None
        if run_state is not None and not reset_num_timesteps:
            run_state.restore(self)
        total_before = self._total_timesteps
        total_timesteps, callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if run_state is not None and not reset_num_timesteps:
            # After ``total_timesteps`` was counted from where the file was saved: what was collected of its rollout is
            # collected again.
            self.num_timesteps = self._num_timesteps_at_start = run_state.num_timesteps
        # What was interrupted goes on to the same total.
        if reset_num_timesteps or total_timesteps != total_before:
            self._start_of_run = self.num_timesteps
        if ranks.size() > 1:
            ranks.check_same("n_envs", self.n_envs)
            ranks.same_parameters(self.policy)
            if self.get_vec_normalize_env() is not None:
                raise ValueError(
                    "VecNormalize in several processes: each would normalise by other statistics. Leave it out: "
                    "normalize_observations and scale_rewards do its work."
                )
        # Else the first rollout would follow the schedules as the last call left them.
        self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        assert self._last_episode_starts is not None
        if self._last_episode_starts.all():
            self.reward_scaler.forget_episodes(self.n_envs)
        return total_timesteps, callback

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total: schedules end at 0 and not below, where learning rates would be negative.
        self._current_progress_remaining = max(0.0, 1.0 - num_timesteps / max(1, total_timesteps))

    def _remaining_of_run(self) -> float:
        """
        What remained of this call of :meth:`learn`, from 1 to 0, when its current rollout began. Other than the progress
        remaining, it is 1 at the beginning of each call, whatever was learned before, and above 0 in every update.
        """
        rollout = self.n_steps * self.n_envs * ranks.size()
        done = self.num_timesteps - rollout - self._start_of_run
        return min(1.0, 1.0 - done / max(1, self._total_timesteps - self._start_of_run))

    def _begin_rollout(self) -> None:
        self._rollout_start = RunState.of_all(self)

    def _begin_update(self) -> None:
        self._rollout_start = None

    def _check_step(self, obs: Any, rewards: Any) -> None:
        """Refuse NaN and infinity that wrappers have made of what :class:`EnvGuard` has seen below them."""
        if changes_numbers(self.env):  # type: ignore[arg-type]
            when = self.describe_env_step()
            check_finite("observation", obs, when)
            check_finite("reward", rewards, when)

    def describe_env_step(self) -> str:
        """Which env step is being made, for errors."""
        return f"after env step {self.num_timesteps // (self.n_envs * ranks.size()) + 1} (num_timesteps={self.num_timesteps})"

    def _describe_interruption(self) -> str:
        """Where training is, for the one who interrupts it."""
        where = f"Training was interrupted after {self.num_timesteps} env steps"
        if self._rollout_start is None:
            return f"{where}, in an update: a model saved now holds a part of it. Checkpoints go on exactly."
        return f"{where}, in a rollout: a model saved now goes on exactly at the start of this rollout, as a checkpoint does."

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollout_start"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file, with all that training needs to go on: ``DPPO.load(path, env=env).learn(total_timesteps,
        reset_num_timesteps=False)``. A file saved in the middle of a rollout, as by ``CheckpointCallback``, goes on at the
        start of this rollout. A path holds the whole new file or what was there before, whatever happens while it is written.
        Of several processes, only the first one writes a path.

        :param path: Path of the file (".zip" is added if it has no suffix), or an open file
        :param exclude: Attributes to leave out, in addition to the default ones
        :param include: Attributes to save that would be left out by default
        :raises OSError: if the file can't be written, for instance because the disk is full
        """
        opened: AbstractContextManager[Any] = nullcontext(path)
        if isinstance(path, (str, pathlib.Path)):
            if ranks.rank() > 0:
                return
            path = pathlib.Path(path)
            opened = atomic_write(path if path.suffix else path.with_suffix(".zip"))
        loaded = self._run_state
        self._run_state = loaded or self._rollout_start or RunState.of(self)
        try:
            with opened as file:
                super().save(file, exclude, include)
        finally:
            self._run_state = loaded

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto") -> None:
        """Load parameters from a zip file or a nested dictionary, see ``BaseAlgorithm.set_parameters``."""
        super().set_parameters(load_path_or_dict, exact_match=exact_match, device=device)
        # How an optimiser runs belongs to this machine and not to the file.
        flags = {"fused", "foreach", "capturable"}
        for optimizer in self.policy.optimizers:
            for group in optimizer.param_groups:
                group.update({flag: optimizer.defaults.get(flag) for flag in flags & group.keys()})
        self._configure_sampler()

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfResumable],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Load the model from a zip file, see ``BaseAlgorithm.load``.

        :param path: Path of the file, or the file
        :param env: The env to run the loaded model on (if registered in Gym, can be str), with as many copies as you like;
            ``None`` if it is only to predict
        :param device: Device on which the code should run
        :param custom_objects: Dictionary of objects to replace upon loading
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force a call to ``reset()`` before training. ``False`` is for an env that is where it was when the
            file was saved; a file from the middle of a rollout goes on at the rollout's start, and so resets it in any case.
        :param kwargs: Constructor arguments to change, for instance ``ft_denoising_steps``, ``scheduler`` or ``n_steps``. With
            a ``seed``, training goes on with other random numbers than it would have.
        :return: The loaded model
        :raises TypeError: for an argument that the constructor does not have
        """
        cls._check_names("load", kwargs)
        if "stats_window_size" in kwargs:  # under which name it is kept
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        env = None if env is None else maybe_make_env(env, verbose=0)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if model._run_state is not None and kwargs.get("seed") is not None:
            model._run_state.generators = None
        return model

    @classmethod
    def _check_names(cls, method: str, kwargs: dict[str, Any]) -> None:
        known = set(constructor_arguments(cls)) - {"policy", "env", "pretrained", "_init_setup_model"}
        refuse_unknown(f"{cls.__name__}.{method}()", kwargs, known)

    def save_pretrained(
        self, folder: str | pathlib.Path, returns: Sequence[float] | None = None, repo_id: str | None = None
    ) -> None:
        """
        Save the model in a folder that is safe to share: weights as safetensors, settings and spaces as JSON, a model card,
        and nothing that is executed when it is loaded. The optimisers' state is not in it: to go on exactly, use :meth:`save`.

        :param folder: The folder, made if it doesn't exist. In one that does, the files of an earlier model are replaced and
            others stay.
        :param returns: Of episodes of an evaluation, for the model card: what ``evaluate_policy`` with
            ``return_episode_rewards=True`` returns first.
        :param repo_id: Where it will be on the Hugging Face hub, for the model card
        :raises ValueError: naming the argument that can't be written, such as a function or a class of your own
        """
        from sb3_dppo.runs.sharing import save_pretrained  # pydantic takes a moment to load.

        save_pretrained(self, folder, returns, repo_id)

    def push_to_hub(
        self,
        repo_id: str,
        returns: Sequence[float] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Add model",
    ) -> str:
        """
        Put what :meth:`save_pretrained` writes on the Hugging Face hub, from where ``from_pretrained("user/name")`` loads it.

        :param repo_id: "user/name", made if it doesn't exist
        :param returns: See :meth:`save_pretrained`
        :param private: Whether a new repository can be seen by its owner only; ``None`` as is usual for the owner
        :param token: The user's; ``None``: that of ``hf auth login``, or in the variable HF_TOKEN
        :param commit_message: Message of the commit
        :return: Address of the repository
        :raises ValueError: as of :meth:`save_pretrained`, or for a name of another form
        """
        from sb3_dppo.runs.hub import push_to_hub

        return push_to_hub(self, repo_id, returns, private, token, commit_message)

    @classmethod
    def from_pretrained(
        cls: type[SelfResumable],
        folder: str | pathlib.Path,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        revision: str | None = None,
        **kwargs: Any,
    ) -> SelfResumable:
        """
        Load a model from a folder that :meth:`save_pretrained` made. Nothing in it is executed, whoever made it.

        :param folder: The folder, or "user/name", where :meth:`push_to_hub` has put one
        :param env: The env to run the model on, with as many copies as you like; ``None`` if it is only to predict. If the
            model was trained with ``VecNormalize``, the env gets its statistics, in a ``VecNormalize`` of its own or a new one
        :param device: Device on which the code should run
        :param revision: Branch, tag or commit on the hub; ``None``: its main branch
        :param kwargs: Constructor arguments to change, for instance ``ft_denoising_steps``, ``scheduler`` or ``n_steps``
        :return: The model
        :raises FileNotFoundError: if the folder, or a file that belongs in it, does not exist, nor a model on the hub
        :raises ValueError: for files that are damaged, too large or not of such a model, or an env that does not fit it
        :raises TypeError: for an argument that the constructor does not have, or that is the folder's
        """
        from sb3_dppo.runs.hub import find_folder
        from sb3_dppo.runs.sharing import from_pretrained

        cls._check_names("from_pretrained", kwargs)
        return from_pretrained(cls, find_folder(folder, revision), env, device, kwargs)
