"""How a diffusion policy is sampled: settings, denoising chains, their log-probabilities, and η of DDIM, fixed or learned."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch as th
from torch.nn import functional as F

from sb3_dppo.diffusion.acceleration import Compiled, CudaGraphs, precision_context, threads_for
from sb3_dppo.diffusion.constants import Constants
from sb3_dppo.diffusion.denoisers import Denoiser, gather_rows
from sb3_dppo.diffusion.noise import InwardClamp, StraightClamp, leads_out
from sb3_dppo.diffusion.process import DenoisingChain, Process, gaussian_log_prob
from sb3_dppo.diffusion.settings import SamplerConfig

# Range of elementwise log-densities that enter a probability ratio (the reference implementation's).
LOG_PROB_RANGE = (-5.0, 2.0)


class DiffusionSampler:
    """
    Samples chunks of actions from two denoisers, the trained one for the last K' steps and the frozen base for those before,
    and computes the log-probabilities of what was sampled.

    :param config: The settings.
    :param networks: What has the networks as attributes, for instance a policy: ``process``, ``denoiser``, ``base_denoiser``,
        ``noise_network`` for a learned η or std (:class:`~sb3_dppo.diffusion.noise.NoiseNetwork`), and ``log_std``, the log of
        a learned floor of the std, shape (Da,).
    :param chunk_shape: (Tp, Da).
    :param first_action: Number of the first action in a chunk that is executed.
    :raises ValueError: naming the setting that does not fit the model.
    """

    def __init__(self, config: SamplerConfig, networks: Any, chunk_shape: tuple[int, int], first_action: int = 0) -> None:
        self.networks = networks
        self.chunk_shape = chunk_shape
        self.first_action = first_action
        self.compiled_denoise = Compiled(self._denoise)
        self.denoise_graphs = CudaGraphs(self._denoise)
        self.constants = Constants()
        self.config = config

    @property
    def config(self) -> SamplerConfig:
        """The settings, which can be replaced."""
        return self._config

    @config.setter
    def config(self, config: SamplerConfig) -> None:
        config.check(self.process, self.chunk_shape[0], self.first_action)
        self._config = config
        self.forget()

    def forget(self) -> None:
        """Forget what was computed or recorded with the settings, and at the addresses, that the sampler had."""
        self._stds: dict[bool, tuple[th.Tensor, th.Tensor]] = {}
        self.constants.clear()
        self.denoise_graphs.clear()

    def keep_constants(self) -> AbstractContextManager[None]:
        """While networks are not exchanged: what all chains have in common is computed once."""
        # Graphs and compiled functions have it in them.
        is_eager = self.config.compile is not True and self.process.table.device.type == "cpu"
        return self.constants.keep() if is_eager else nullcontext()

    @property
    def process(self) -> Process:
        """The denoising process."""
        return self.networks.process

    @property
    def inference_steps(self) -> int:
        """S, the steps that are run."""
        return self.process.inference_steps

    @property
    def ft_denoising_steps(self) -> int:
        """K', the last of them, which are fine-tuned."""
        steps = self.config.ft_denoising_steps
        return self.inference_steps if steps is None else steps

    @property
    def n_base_steps(self) -> int:
        """S - K', the steps that the base denoiser runs: the position in the process of denoising index 0."""
        return self.inference_steps - self.ft_denoising_steps

    @property
    def act_steps(self) -> int:
        """Ta, the actions of a chunk that are executed."""
        return self.chunk_shape[0] - self.first_action if self.config.act_steps is None else self.config.act_steps

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the networks' products have the configured precision. Distributions stay in float32."""
        return precision_context(self.process.table.device, self.config.precision)

    def noise_shape(self, n: int) -> tuple[int, ...]:
        """(S+1, B, Tp, Da), of the noise for B = n decisions: the initial iterate, then one per step."""
        return (self.inference_steps + 1, n, *self.chunk_shape)

    def draw_noise(self, n: int, generator: th.Generator | None = None) -> th.Tensor:
        """
        :param n: B, the number of decisions.
        :param generator: Where to draw from; ``None`` means PyTorch's default generator.
        :return: What :meth:`sample` takes as ``noise``: standard normal, shape (S+1, B, Tp, Da).
        """
        return th.randn(self.noise_shape(n), device=self.process.table.device, generator=generator)

    def sample(
        self,
        features: th.Tensor | None,
        base_features: th.Tensor | None,
        noise: th.Tensor,
        n_base_steps: int,
        deterministic: bool = False,
    ) -> DenoisingChain:
        """
        Sample one chunk per row (Ren et al. 2024, section 4.3 for the floors of the std), without gradients.

        :param features: Features of the denoiser, shape (B, features_dim). ``None`` if neither it nor the noise network runs.
        :param base_features: Features of the base denoiser, likewise.
        :param noise: Standard normal, shape (S+1, B, Tp, Da): the initial iterate, then one per step in the order in which
            they run, before ``noise_clip``.
        :param n_base_steps: How many of the steps, the first ones, the base denoiser runs.
        :param deterministic: Evaluation instead of exploration: DDPM keeps a small std except at the last step, DDIM uses
            η = 0, and the initial iterate stays random.
        :return: Chunks, chains and log-probabilities.
        """
        device = noise.device
        with th.no_grad(), threads_for(noise.shape[1]):
            eta = None if self.config.learn_eta is None or features is None else self.learned_eta(features)
            tensors = (features, base_features, noise, *self._sampling_stds(deterministic, features, eta), eta)
            arguments = (n_base_steps, deterministic)
            if self.config.compile is True:
                chain = self.compiled_denoise(device, *tensors, *arguments)
            elif self.config.compile == "auto" and device.type == "cuda":
                chain = self.denoise_graphs(tensors, *arguments)
            else:
                return self._denoise(*tensors, *arguments)
        # Copies, for on a GPU the next call overwrites these.
        return DenoisingChain(*(tensor.clone() for tensor in chain))

    def _denoise(
        self,
        features: th.Tensor | None,
        base_features: th.Tensor | None,
        noise: th.Tensor,
        step_std: th.Tensor,
        log_prob_std: th.Tensor,
        learned_eta: th.Tensor | None,
        n_base_steps: int,
        deterministic: bool,
    ) -> DenoisingChain:
        """What is left of :meth:`sample` to compile."""
        process, noise_clip, first = self.process, self.config.noise_clip, self.n_base_steps
        exploration_eta = self.config.eta if learned_eta is None else learned_eta
        eta = 0.0 if deterministic and process.is_ddim else exploration_eta
        with self.autocast():
            predictions = []
            if base_features is not None and n_base_steps > 0:
                predictions += self._begin_chain("base_denoiser", base_features, slice(n_base_steps))
            if features is not None and n_base_steps < self.inference_steps:
                predictions += self._begin_chain("denoiser", features, slice(n_base_steps, None))
            step_noise = noise[1:].clamp(-noise_clip, noise_clip) * step_std
            sample = noise[0] if process.starts_from_noise else th.zeros_like(noise[0])
            iterates, means = [sample], []
            for position, (predict, added_noise) in enumerate(zip(predictions, step_noise.unbind(), strict=True)):
                output = predict(sample).float()
                mean, _ = process.transition(sample, output, position, eta)
                if position >= first:
                    # In log-probabilities η is always the one of exploration.
                    if eta is not exploration_eta:
                        means.append(process.transition(sample, output, position, exploration_eta)[0])
                    else:
                        means.append(mean)
                sample = mean + added_noise
                iterates.append(sample)
        iterates[-1] = process.clip_final(sample)
        chain = th.stack(iterates[first:], dim=1)
        log_prob = gaussian_log_prob(chain[:, 1:], th.stack(means, dim=1), log_prob_std)
        return DenoisingChain(iterates[-1], chain, log_prob)

    def _begin_chain(self, name: str, features: th.Tensor, steps: slice) -> list[Callable[[th.Tensor], th.Tensor]]:
        """Functions that predict, of one of the denoisers at these steps."""
        denoiser = getattr(self.networks, name)
        key = (name, steps.start, steps.stop)
        prepared = self.constants.get(key, denoiser.parameters, lambda: denoiser.prepare(self.process.timesteps[steps]))
        return denoiser.for_chain(features, prepared)

    def _sampling_stds(
        self, deterministic: bool, features: th.Tensor | None, learned_eta: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """``step_std`` and ``log_prob_std`` of :meth:`_denoise`."""
        compute = partial(self._stds_of, deterministic, features, learned_eta)
        if learned_eta is not None or self.config.learn_std == "state":
            return compute()
        if self.config.learns_std:
            weights = (self.networks.log_std, self.networks.noise_network.output.bias)
            return self.constants.get(("stds", deterministic), lambda: weights, compute)
        if deterministic not in self._stds:
            self._stds[deterministic] = compute()
        return self._stds[deterministic]

    def _stds_of(self, deterministic: bool, features: Any, learned_eta: Any) -> tuple[th.Tensor, th.Tensor]:
        eta = self.config.eta if learned_eta is None else learned_eta
        sigma = self.process.sigmas()[:, None, None, None]
        sampling_floor, log_prob_floor = self._floors_of_steps(features)
        if deterministic:
            std = self.process.deterministic_stds()[:, None, None, None]
        else:
            std = self._with_eta(sigma, eta).clamp(min=sampling_floor)
        log_prob_eta = eta if learned_eta is None else learned_eta[:, None]
        return std, self._with_eta(sigma[self.n_base_steps :, 0], log_prob_eta).clamp(min=log_prob_floor)

    def step_mean(
        self, denoiser: Denoiser, features: th.Tensor, chain_prev: th.Tensor, denoising_index: th.Tensor, eta: Any
    ) -> th.Tensor:
        """
        Means of single denoising steps, which may be different steps of different chains. Differentiable.

        :param denoiser: ``denoiser`` or ``base_denoiser``.
        :param features: Its features for each step, shape (N, features_dim).
        :param chain_prev: Iterates before the steps, shape (N, Tp, Da).
        :param denoising_index: Which steps, in 0 … K'-1, shape (N,).
        :param eta: DDIM's η, a number or of shape (N, 1, Da).
        :return: Means of the iterates after the steps, shape (N, Tp, Da).
        """
        with self.autocast():
            embeddings = denoiser.embed_timesteps(self.process.timesteps[self.n_base_steps :])
            output = denoiser(chain_prev, gather_rows(embeddings, denoising_index), denoiser.encode(features)).float()
        return self.process.transition(chain_prev, output, denoising_index + self.n_base_steps, eta)[0]

    def _floors_of_steps(self, features: th.Tensor | None) -> tuple[Any, Any]:
        """In sampling, of all steps, numbers or of shape (Da,) or (S, B, 1, Da), and in log-probabilities, of the last K'."""
        if self.config.learn_std != "state" or features is None:
            return self.floors()
        S, B = self.inference_steps, len(features)
        positions = th.arange(S, device=features.device).repeat_interleave(B)
        floor = self.floors(features.repeat(S, 1), positions)[0].view(S, B, 1, -1)
        return floor, floor[self.n_base_steps :].transpose(0, 1)

    def step_std(self, features: th.Tensor, denoising_index: th.Tensor, eta: Any) -> th.Tensor:
        """
        :param features: The actor's features for each step, shape (N, features_dim).
        :param denoising_index: Which steps, in 0 … K'-1, shape (N,).
        :param eta: DDIM's η, a number or of shape (N, 1, Da).
        :return: Their std in log-probabilities, shape (N, 1, 1) or (N, 1, Da). Differentiable where it is learned.
        """
        sigma = self.process.sigmas()[self.n_base_steps :][denoising_index][:, None, None]
        return self._with_eta(sigma, eta).clamp(min=self.floors(features, denoising_index + self.n_base_steps)[1])

    def chain_log_prob(self, features: th.Tensor, chain: th.Tensor) -> th.Tensor:
        """
        Log-probabilities of whole chains under the denoiser. Differentiable.

        :param features: Its features, shape (B, features_dim).
        :param chain: Chains, shape (B, K'+1, Tp, Da).
        :return: Elementwise log-densities, shape (B, K', Tp, Da).
        :raises ValueError: for chains of another length.
        """
        n_steps = self.ft_denoising_steps
        if chain.shape[1] != n_steps + 1:
            raise ValueError(f"chain has {chain.shape[1]} iterates, but ft_denoising_steps={n_steps} means {n_steps + 1}.")
        features = features.repeat_interleave(n_steps, dim=0)
        denoising_index = th.arange(n_steps, device=chain.device).repeat(len(chain))
        eta = self.eta(features)
        mean = self.step_mean(self.networks.denoiser, features, chain[:, :-1].flatten(0, 1), denoising_index, eta)
        log_prob = gaussian_log_prob(chain[:, 1:].flatten(0, 1), mean, self.step_std(features, denoising_index, eta))
        return log_prob.view_as(chain[:, 1:])

    def bc_loss(self, features: th.Tensor, actions: th.Tensor, timesteps: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """
        The supervised loss of the denoiser (Ho et al. 2020, eq. 14; of a flow, Lipman et al. 2023, eq. 23).

        :param features: Its features, shape (B, features_dim).
        :param actions: Normalised chunks, shape (B, Tp, Da).
        :param timesteps: As the process draws them, shape (B,).
        :param noise: Standard normal, of the shape of ``actions``.
        :return: Mean squared error to what ``prediction_type`` asks for, a scalar.
        """
        noisy, denoiser = self.process.add_noise(actions, noise, timesteps), self.networks.denoiser
        with self.autocast():
            if timesteps.is_floating_point():
                embeddings = denoiser.embed_timesteps(timesteps)
            else:  # each of the few there are once
                steps = th.arange(self.process.denoising_steps, device=actions.device)
                embeddings = gather_rows(denoiser.embed_timesteps(steps), timesteps)
            output = denoiser(noisy, embeddings, denoiser.encode(features))
        return F.mse_loss(output.float(), self.process.denoising_target(actions, noise, timesteps))

    def eta(self, features: th.Tensor) -> float | th.Tensor:
        """
        :param features: The actor's features, shape (N, features_dim).
        :return: DDIM's η: a number, or of shape (N, 1, Da) if it is learned.
        """
        return self.config.eta if self.config.learn_eta is None else self.learned_eta(features)

    def learned_eta(self, features: th.Tensor) -> th.Tensor:
        """
        What was learned is the offset from the configured ``eta``, so that a policy that has learned none begins there.

        :param features: The actor's features, shape (N, features_dim).
        :return: DDIM's η, within ``eta_range``, shape (N, 1, Da). Differentiable, but not in the features.
        """
        if self.config.learn_eta == "state":
            eta = self.config.eta + self.networks.noise_network(features, 0.0)
            return InwardClamp.apply(eta, *self.config.eta_range)[:, None]
        return StraightClamp.apply(self._shared_eta(), *self.config.eta_range).expand(len(features), 1, -1)

    def _shared_eta(self) -> th.Tensor:
        """η of all rows, not clamped, shape (Da,). Without the features, only the network's last bias has a gradient."""
        return self.config.eta + self.networks.noise_network.output.bias

    def floors(self, features: th.Tensor | None = None, position: th.Tensor | None = None) -> tuple[Any, Any]:
        """
        :param features: The actor's features for each of N steps, shape (N, features_dim); not needed unless
            ``learn_std="state"``.
        :param position: Their positions in the process, shape (N,), likewise.
        :return: Floors of the std in sampling and in log-probabilities: numbers, or a learned one, shape (Da,) or (N, 1, Da).
        """
        if not self.config.learns_std:
            return self.config.floors
        learned = self.learned_std(features, position)
        return learned, learned

    def learned_std(self, features: th.Tensor | None = None, position: th.Tensor | None = None) -> th.Tensor:
        """The learned floor of the std, differentiable; arguments and shape as of :meth:`floors`."""
        bounds = self.config.std_range
        if self.config.learn_std == "state":
            assert features is not None and position is not None
            offset = self.networks.noise_network(features, position / self.inference_steps)[:, None]
            return InwardClamp.apply(self._initial_std() * offset.exp(), *bounds)
        std = self._shared_std()
        return StraightClamp.apply(std, *bounds) if th.is_grad_enabled() else std.clamp(*bounds)

    def _initial_std(self) -> Any:
        """What ``learn_std`` begins with."""
        return self.networks.log_std.exp().detach() if self.config.has_log_std else self.config.floors[1]

    def _shared_std(self) -> th.Tensor:
        """The learned floor of all rows, not clamped, shape (Da,)."""
        if self.config.learn_std is None:
            return self.networks.log_std.exp()
        return self._initial_std() * self.networks.noise_network.output.bias.exp()

    def stop_at_bounds(self) -> None:
        """
        Drop the gradients, those of a whole minibatch, that would lead an η or a std that all rows share out of its range.
        (Of one that depends on the state, this is done row by row.)
        """
        config, bias = self.config, self.networks.noise_network.output.bias
        shared = []
        if config.learn_eta == "action":
            shared.append((bias, self._shared_eta(), config.eta_range))
        if config.learn_std == "action" or (config.learn_std is None and config.has_log_std):
            parameter = self.networks.log_std if config.learn_std is None else bias
            shared.append((parameter, self._shared_std(), config.std_range))
        for parameter, value, bounds in shared:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(leads_out(value.detach(), parameter.grad, *bounds), 0.0)

    def _with_eta(self, sigma: th.Tensor, eta: float | th.Tensor) -> th.Tensor:
        """The std of steps whose std with η = 1 is ``sigma``."""
        return eta * sigma if self.process.is_ddim else sigma


def mean_over_executed(values: th.Tensor, n_executed: th.Tensor, first_action: int = 0) -> th.Tensor:
    """
    :param values: One value per element of a chunk, shape (N, Tp, Da).
    :param n_executed: How many actions of each chunk were executed, shape (N,).
    :param first_action: Number of the first of them in the chunk.
    :return: Means over the executed actions and the action dimensions, shape (N,).
    """
    per_action = values.mean(dim=-1)[:, first_action:]
    executed = th.arange(per_action.shape[-1], device=per_action.device) < n_executed[:, None]
    return (per_action * executed).sum(dim=-1) / n_executed


def mean_log_prob(log_prob: th.Tensor, n_executed: th.Tensor, first_action: int = 0) -> th.Tensor:
    """
    Clamp elementwise log-densities and average them over the executed actions of each chunk; see :func:`mean_over_executed`.

    :param log_prob: Shape (N, Tp, Da).
    :param n_executed: Shape (N,).
    :param first_action: See there.
    :return: Shape (N,).
    """
    return mean_over_executed(log_prob.clamp(*LOG_PROB_RANGE), n_executed, first_action)
