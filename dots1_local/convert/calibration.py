"""What the folder of a calibration brings to a conversion."""

from pathlib import Path

from dots1_local.architecture import Dots1Config
from dots1_local.errors import Dots1Error
from dots1_local.quant.calibration_folder import IMATRIX, SENSITIVITY
from dots1_local.quant.importance import Importance, load_importance
from dots1_local.quant.plan import QuantPlan
from dots1_local.quant.sensitivity import Sensitivity, load_sensitivity

__all__ = ["load_calibration", "predicted_kl"]


def load_calibration(
    folder: Path, imatrix: str | Path | None = None
) -> tuple[Sensitivity, Importance]:
    """The folder's sensitivity, and its importance, or that in the file `imatrix`.

    Raises:
        Dots1Error: there is no such folder, it lacks one, or its two do not belong together.
    """
    if not folder.is_dir():
        raise Dots1Error(f"{folder} is no folder; dots1 calibrate -o {folder} makes it")
    for name in (SENSITIVITY, *([] if imatrix else [IMATRIX])):
        if not (folder / name).is_file():
            raise Dots1Error(f"{folder} has no {name}; dots1 calibrate -o {folder} makes it")
    sensitivity = load_sensitivity(folder / SENSITIVITY)
    importance = load_importance(imatrix or folder / IMATRIX)
    if imatrix is None and importance.sha256 != sensitivity.imatrix:
        raise Dots1Error(
            f"{folder / SENSITIVITY} was measured with another importance file than "
            f"{importance.path} is; calibrate again, or name the file by --imatrix to use it "
            "nevertheless"
        )
    return sensitivity, importance


def predicted_kl(
    folder: Path, config: Dots1Config, plan: QuantPlan, importance: Importance
) -> float | None:
    """What the folder's sensitivity says of a plan; None where it has none or not of its types.

    Raises:
        Dots1Error: it is another model's, or damaged.
    """
    if not (folder / SENSITIVITY).is_file():
        return None
    sensitivity = load_sensitivity(folder / SENSITIVITY)
    sensitivity.check(config)
    if sensitivity.imatrix != importance.sha256:
        return None
    try:
        return sensitivity.predict(plan.types)
    except Dots1Error:  # a type that was not measured
        return None
