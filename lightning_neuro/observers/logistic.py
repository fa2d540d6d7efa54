"""The reference classifier: scikit-learn's logistic regression with balanced classes, run to convergence."""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_neuro.observers.ridge import CrossFit

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def logistic_cross_fit(x: Tensor, y: Tensor, fold: Tensor, num_folds: int) -> CrossFit:
    """Fit logistic observers, one attribute at a time; the strength of the penalty is chosen on a separate fold.

    With fold k held out, the strength (of four) with the smallest log-loss on fold k + 1 is chosen, the observer being
    fitted on the remaining folds; it is then fitted on all folds but k. Arguments and result are those of
    `ridge.cross_fit`, with two differences: at least 3 folds are needed, and the scores are log-odds.
    """
    inputs, truth, which = x.cpu().numpy(), y.cpu(), fold.cpu()
    scores = torch.full_like(truth, torch.nan)
    fold_weights = torch.zeros(num_folds, y.shape[1], x.shape[1], dtype=x.dtype)
    weights = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype)
    for a in range(y.shape[1]):
        known = truth[:, a].isfinite()
        for k in range(num_folds):
            train, test = known & (which != k), known & (which == k)
            inner = train & (which != (k + 1) % num_folds)
            model = _chosen(inputs, truth[:, a], inner, train & ~inner, train)
            if model is not None and test.any():
                scores[test, a] = torch.as_tensor(model.decision_function(inputs[test.numpy()]), dtype=y.dtype)
                fold_weights[k, a] = torch.as_tensor(model.coef_[0], dtype=x.dtype)
        model = _chosen(inputs, truth[:, a], known & (which != 0), known & (which == 0), known)
        if model is not None:
            weights[a] = torch.as_tensor(model.coef_[0], dtype=x.dtype)
    return CrossFit(scores.to(x.device), weights.to(x.device), fold_weights.to(x.device))


def _chosen(inputs: Any, y: Tensor, inner: Tensor, validation: Tensor, train: Tensor) -> Any:
    """The observer fitted on `train` with the best strength on `validation`; None if `train` has a single class."""
    if not _two_classes(y[train]):
        return None
    strength = STRENGTHS[1]
    if _two_classes(y[inner]) and _two_classes(y[validation]):
        from sklearn.metrics import log_loss

        weight = torch.where(y[validation] == 1, 1 / y[validation].sum(), 1 / (1 - y[validation]).sum()).numpy()

        def loss(strength: float) -> float:
            predicted = _fit(inputs, y, inner, strength).predict_proba(inputs[validation.numpy()])
            return float(log_loss(y[validation].numpy(), predicted, sample_weight=weight))

        strength = min(STRENGTHS, key=loss)
    return _fit(inputs, y, train, strength)


def _fit(inputs: Any, y: Tensor, rows: Tensor, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that does not converge within the steps is still usable
        return model.fit(inputs[rows.numpy()], y[rows].numpy())


def _two_classes(y: Tensor) -> bool:
    return bool(len(y)) and 0 < float(y.sum()) < len(y)
