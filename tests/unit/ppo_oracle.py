"""PPO written a second time: NumPy in float64, loops, and gradients by finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np

from starling.algorithms.ppo_parameters import PPOParameters
from starling.storage.rollout import Rollout

Weights = dict[str, np.ndarray]
Rows = dict[str, np.ndarray]


class Statistics:
    """Mean and standard deviation of all rows ever seen, which are simply kept."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    @property
    def mean(self) -> Any:
        return np.mean(self.rows, 0) if self.rows else 0.0

    @property
    def std(self) -> Any:
        return np.sqrt(np.var(self.rows, 0) + 1e-8) if self.rows else 1.0


def softmax_logs(logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None:
        logits = np.where(mask != 0, logits, -1e9)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_probs_and_entropies(outputs, log_std, actions, masks) -> tuple[np.ndarray, np.ndarray]:
    """Of rows of outputs: a softmax where there are no log-stds, else a diagonal Gaussian."""
    if not log_std.size:
        logs = softmax_logs(outputs, masks)
        chosen = np.array([row[action] for row, action in zip(logs, actions, strict=True)])
        return chosen, -(np.exp(logs) * logs).sum(-1)
    z = (actions - outputs) / np.exp(log_std)
    constant = 0.5 * np.log(2 * np.pi)
    entropy = (log_std + 0.5 + constant).sum()
    return (-0.5 * z**2 - log_std - constant).sum(-1), np.full(len(z), entropy)


class Oracle:
    """The state of one learner, with separate networks of one tanh layer.

    Args:
        weights: By name, as `Policy.named` gives them; their order is that of the gradients.
        options: What PPO is told.
        mistake: Name of a bug to have.
    """

    def __init__(self, weights: Weights, options: PPOParameters, mistake: str = ""):
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.options = options
        self.mistake = mistake
        self.observations, self.reward_sums = Statistics(), Statistics()
        self.running_sums: np.ndarray | None = None
        size = sum(value.size for value in weights.values())
        self.first_moment, self.second_moment = np.zeros(size), np.zeros(size)
        if options.optimizer == "rmsprop":
            self.second_moment = np.ones(size)
        self.gradient_steps = 0

    # ---- networks

    def forward(self, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kernel, bias = weights["torso/Dense_0/kernel"], weights["torso/Dense_0/bias"]
        policy, value = (np.tanh(x @ kernel[i] + bias[i]) for i in (0, 1))
        outputs = policy @ weights["policy/kernel"] + weights["policy/bias"]
        return outputs, (value @ weights["value/kernel"] + weights["value/bias"])[..., 0]

    @staticmethod
    def _log_std(weights: Weights) -> np.ndarray:
        return weights.get("log_std", np.zeros(0))

    def normal(self, observations: np.ndarray) -> np.ndarray:
        if not self.options.normalize_observations:
            return observations.astype(np.float64)
        statistics = self.observations
        return np.clip((observations - statistics.mean) / statistics.std, -10, 10)

    def _vector(self) -> np.ndarray:
        return np.concatenate([value.reshape(-1) for value in self.weights.values()])

    def _named(self, vector: np.ndarray) -> Weights:
        named, start = {}, 0
        for name, value in self.weights.items():
            named[name] = vector[start : start + value.size].reshape(value.shape)
            start += value.size
        return named

    # ---- advantages

    def rows(self, rollout: Rollout) -> Rows:
        """Everything that the update needs, row by row in the order t * N + n."""
        options = self.options
        steps, envs = rollout.rewards.shape
        valid = np.ones((steps, envs), bool) if rollout.valid is None else rollout.valid
        if self.mistake == "statistics first" and options.normalize_observations:
            self.observations.rows.extend(rollout.observations[:-1][valid])
        x = self.normal(rollout.observations)
        outputs, values = self.forward(self.weights, x)
        _, final_values = self.forward(self.weights, self.normal(rollout.final_observations))
        advantages = self._advantages(rollout, self._rewards(rollout, valid), values, final_values)
        flat = steps * envs
        actions = rollout.actions.reshape(flat, *rollout.actions.shape[2:])
        masks = None if rollout.action_masks is None else rollout.action_masks.reshape(flat, -1)
        outputs = outputs[:-1].reshape(flat, -1)
        rows = {
            "x": x[:-1].reshape(flat, -1),
            "action": actions,
            "old": log_probs_and_entropies(outputs, self._log_std(self.weights), actions, masks)[0],
            "value": values[:-1].reshape(flat),
            "advantage": advantages.reshape(flat),
            "target": (advantages + values[:-1]).reshape(flat),
            "valid": valid.reshape(flat),
        }
        if masks is not None:
            rows["mask"] = masks
        if options.normalize_observations and self.mistake != "statistics first":
            self.observations.rows.extend(rollout.observations[:-1][valid])
        return rows

    def _advantages(self, rollout: Rollout, rewards, values, final_values) -> np.ndarray:
        options = self.options
        steps, envs = rewards.shape
        advantages = np.zeros((steps, envs))
        for n in range(envs):
            following = 0.0
            for t in reversed(range(steps)):
                next_value = values[t + 1, n]
                if rollout.truncated[t, n] and not rollout.terminated[t, n]:
                    if self.mistake == "next episode's value":
                        pass
                    elif self.mistake == "truncation terminates":
                        next_value = 0.0
                    else:
                        next_value = final_values[list(rollout.final_index).index(t * envs + n)]
                if rollout.terminated[t, n]:
                    next_value = 0.0
                if rollout.terminated[t, n] or rollout.truncated[t, n]:
                    following = 0.0
                delta = rewards[t, n] + options.gamma * next_value - values[t, n]
                following = delta + options.gamma * options.gae_lambda * following
                advantages[t, n] = following
        return advantages

    def _rewards(self, rollout: Rollout, valid: np.ndarray) -> np.ndarray:
        options, rewards = self.options, rollout.rewards.astype(np.float64)
        if not options.normalize_rewards:
            return rewards
        steps, envs = rewards.shape
        if self.running_sums is None:
            self.running_sums = np.zeros(envs)
        before = self.reward_sums.std
        for t in range(steps):
            for n in range(envs):
                if valid[t, n]:
                    self.running_sums[n] = self.running_sums[n] * options.gamma + rewards[t, n]
                    self.reward_sums.rows.append(self.running_sums[n])
                    if rollout.terminated[t, n] or rollout.truncated[t, n]:
                        self.running_sums[n] = 0.0
        std = before if self.mistake == "rewards by old statistics" else self.reward_sums.std
        return np.clip(rewards / std, -10, 10)

    # ---- the update

    def loss(self, weights: Weights, batch: Rows, clip: float | None):
        """The loss of a minibatch, and its parts."""
        options = self.options
        batch = {name: column[batch["valid"]] for name, column in batch.items()}
        outputs, values = self.forward(weights, batch["x"])
        advantages, targets = batch["advantage"], batch["target"]
        if options.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_probs, entropies = log_probs_and_entropies(
            outputs, self._log_std(weights), batch["action"], batch.get("mask")
        )
        ratios = np.exp(log_probs - batch["old"])
        surrogates, outside = ratios * advantages, np.zeros(len(ratios))
        if clip is not None:
            surrogates = np.minimum(surrogates, np.clip(ratios, 1 - clip, 1 + clip) * advantages)
            outside = abs(ratios - 1) > clip
        if self.mistake == "plain policy gradient":
            surrogates = log_probs * advantages
        errors = (values - targets) ** 2
        if options.value_clip is not None:
            low, high = batch["value"] - options.value_clip, batch["value"] + options.value_clip
            errors = np.maximum(errors, (np.clip(values, low, high) - targets) ** 2)
        kl = ratios - 1 - np.log(ratios)
        means = np.mean([-surrogates, errors, -entropies, kl, outside], 1)
        total = means[0] + options.value_coef * means[1] + options.entropy_coef * means[2]
        return total, means

    def gradient(self, batch: Rows, clip: float | None) -> np.ndarray:
        vector, step = self._vector(), 1e-5
        gradient = np.zeros_like(vector)
        for i in range(len(vector)):
            up, down = vector.copy(), vector.copy()
            up[i] += step
            down[i] -= step
            difference = self.loss(self._named(up), batch, clip)[0]
            difference -= self.loss(self._named(down), batch, clip)[0]
            gradient[i] = difference / (2 * step)
        return gradient

    def _descend(self, gradient: np.ndarray, lr: float) -> None:
        options = self.options
        norm = np.sqrt((gradient**2).sum())
        if options.max_grad_norm is not None and norm > options.max_grad_norm:
            gradient = gradient * options.max_grad_norm / norm
        self.gradient_steps += 1
        if options.optimizer == "adam":
            self.first_moment = 0.9 * self.first_moment + 0.1 * gradient
            self.second_moment = 0.999 * self.second_moment + 0.001 * gradient**2
            first = self.first_moment / (1 - 0.9**self.gradient_steps)
            second = self.second_moment / (1 - 0.999**self.gradient_steps)
            change = first / (np.sqrt(second) + options.adam_eps)
        else:
            self.second_moment = 0.99 * self.second_moment + 0.01 * gradient**2
            change = gradient / np.sqrt(self.second_moment + options.adam_eps)
        self.weights = self._named(self._vector() - lr * change)

    def update(
        self, rollout: Rollout, progress: float, orders: list[np.ndarray]
    ) -> dict[str, float]:
        """One rollout; `orders` has the order of the rows for each epoch."""
        options = self.options
        rows = self.rows(rollout)
        lr = options.lr * (1 - progress if options.lr_schedule == "linear" else 1)
        clip = options.clip_param
        if clip is not None and options.clip_schedule == "linear":
            clip *= 1 - progress
        if self.mistake == "same order in all epochs":
            orders = [orders[0]] * len(orders)
        if self.mistake == "advantages in another order":
            rows["advantage"] = np.roll(rows["advantage"], 1)
        size = options.mini_batch_size or len(rows["x"])
        numbers = []
        for order in orders:
            for start in range(0, len(rows["x"]), size):
                index = order[start : start + size]
                batch = {name: column[index] for name, column in rows.items()}
                gradient = self.gradient(batch, clip)
                parts = self.loss(self.weights, batch, clip)[1]
                numbers.append([*parts, np.sqrt((gradient**2).sum())])
                self._descend(gradient, lr)
        values, targets = (rows[name][rows["valid"]] for name in ("value", "target"))
        means = np.mean(numbers, 0)
        return {
            "train/policy_gradient_loss": means[0],
            "train/value_loss": means[1],
            "train/entropy_loss": means[2],
            "train/approx_kl": means[3],
            "train/clip_fraction": means[4],
            "train/grad_norm": means[5],
            "train/learning_rate": lr,
            "train/explained_variance": 1 - np.var(targets - values) / np.var(targets),
            "rollout/value_mean": values.mean(),
        }
