"""Update rules in numpy, float64, from their papers. Weights and gradients are dicts by path."""

import numpy as np


class AdamW:
    """Loshchilov and Hutter 2017, algorithm 2, with the decay multiplied by the learning rate as torch has it."""

    def __init__(self, b1, b2, eps, weight_decay, decayed, nesterov=False):
        self.b1, self.b2, self.eps, self.weight_decay, self.decayed = b1, b2, eps, weight_decay, decayed
        self.nesterov = nesterov
        self.m, self.v, self.steps = {}, {}, 0

    def step(self, weights, grads, rate):
        self.steps += 1
        return {path: w - rate * self.direction(path, w, np.float64(grads[path])) for path, w in weights.items()}

    def direction(self, path, w, g):
        self.m[path] = self.b1 * self.m.get(path, 0) + (1 - self.b1) * g
        self.v[path] = self.b2 * self.v.get(path, 0) + (1 - self.b2) * g**2
        m_hat = self.m[path] / (1 - self.b1**self.steps)
        if self.nesterov:  # Dozat 2016
            m_hat = self.b1 * self.m[path] / (1 - self.b1 ** (self.steps + 1))
            m_hat = m_hat + (1 - self.b1) * g / (1 - self.b1**self.steps)
        v_hat = self.v[path] / (1 - self.b2**self.steps)
        return m_hat / (np.sqrt(v_hat) + self.eps) + (self.weight_decay * w if path in self.decayed else 0)


class Lion:
    """Chen et al. 2023, algorithm 2: the sign of one average moves the weights, another average is kept."""

    def __init__(self, b1, b2, weight_decay, decayed):
        self.b1, self.b2, self.weight_decay, self.decayed = b1, b2, weight_decay, decayed
        self.m = {}

    def step(self, weights, grads, rate):
        return {path: w - rate * self.direction(path, w, np.float64(grads[path])) for path, w in weights.items()}

    def direction(self, path, w, g):
        m = self.m.get(path, np.zeros_like(g))
        self.m[path] = self.b2 * m + (1 - self.b2) * g
        return np.sign(self.b1 * m + (1 - self.b1) * g) + (self.weight_decay * w if path in self.decayed else 0)


class Muon:
    """Jordan et al. 2024, with the update size of Liu et al. 2025; AdamW for what ``matrices`` does not name.

    ``matrices`` gives for each path the batch, row and column dimensions. Momentum is Nesterov's with the bias
    corrections that optax documents, beta 0.95.
    """

    beta = 0.95

    def __init__(self, matrices, adamw):
        self.matrices, self.adamw = matrices, adamw
        self.m, self.steps = {}, 0

    def step(self, weights, grads, rate):
        self.steps += 1
        self.adamw.steps += 1
        moved = {}
        for path, w in weights.items():
            g = np.float64(grads[path])
            if path not in self.matrices:
                moved[path] = w - rate * self.adamw.direction(path, w, g)
                continue
            self.m[path] = self.beta * self.m.get(path, 0) + (1 - self.beta) * g
            nesterov = self.beta * self.m[path] / (1 - self.beta ** (self.steps + 1))
            nesterov = nesterov + (1 - self.beta) * g / (1 - self.beta**self.steps)
            direction = each_matrix(nesterov, *self.matrices[path], self.sized)
            moved[path] = w - rate * (direction + self.adamw.weight_decay * w)
        return moved

    def sized(self, matrix):
        return 0.2 * np.sqrt(max(matrix.shape)) * newton_schulz(matrix, self.adamw.eps)


def newton_schulz(x, eps):
    """Five rounds of ``a X + b (X X^T) X + c (X X^T)^2 X`` from a matrix of Frobenius norm 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def each_matrix(x, batch, rows, columns, function):
    """Applies a function to each of the matrices in an array, from the row to the column dimensions."""
    order = (*batch, *rows, *columns)
    moved = np.transpose(x, order)
    shape = [int(np.prod([x.shape[i] for i in dims])) for dims in (batch, rows, columns)]
    result = np.stack([function(matrix) for matrix in moved.reshape(shape)])
    return np.transpose(result.reshape(moved.shape), np.argsort(order))


def clipped(grads, limit):
    """Gradients whose norm over all weights together is at most ``limit``."""
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
    return {path: np.float64(g) * min(1, limit / norm) for path, g in grads.items()}
