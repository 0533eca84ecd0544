"""``chanprune reproduce``: measures published results again."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from chanprune_ext.cli.options import DATA_HELP, ClassFile, Precision, Seed
from chanprune_ext.cli.run_printing import command_line, run_and_print, say
from chanprune_ext.cli.tables import trial_table
from chanprune_ext.cli.terminal import plain_console

__all__ = ["reproduce"]


class Result(str, Enum):
    """Results that can be measured again."""

    CIFAR10_RESNET56 = "cifar10-resnet56"
    IMAGENET_MOBILENETV2 = "imagenet-mobilenetv2"


def reproduce(
    result: Annotated[Result, typer.Argument(help="Which result.", show_default=False)],
    weights: Annotated[Path, typer.Option(help="Trained weights.", show_default=False)],
    data: Annotated[str, typer.Option(help=DATA_HELP, show_default=False)],
    test_data: Annotated[
        str | None, typer.Option(help="Test images, if --data holds none.", show_default=False)
    ] = None,
    class_file: ClassFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/<result>")
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(min=1, help="Unlabelled images.", show_default="512; MobileNetV2: 1000"),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=0, help="Draws of them that every way of pruning is tried with.")
    ] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Only the ways with this in their name; repeatable.")
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=0, help="Epochs of fine-tuning and distillation; 0: no training.")
    ] = 10,
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic of the training.")
    ] = Precision.FP32,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Train through torch.compile.", show_default=False)
    ] = False,
    seed: Seed = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on in the folder where an earlier start was stopped, or begin there.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Prunes a published network in several ways, without and with training, beside the article."""
    from chanprune_ext.atomic_files import make_folder
    from chanprune_ext.checksum import checksum
    from chanprune_ext.jobs.job_folder import refuse_unfinished
    from chanprune_ext.jobs.published import cifar10_resnet56_set, imagenet_mobilenetv2_set
    from chanprune_ext.jobs.published_jobs import cifar10_resnet56_job, imagenet_mobilenetv2_job
    from chanprune_ext.jobs.trial_report import trial_report
    from chanprune_ext.jobs.trials import load_trials, run_trials, save_trials
    from chanprune_ext.report import write_report

    folder = out or Path("runs") / result.value
    small = result is Result.CIFAR10_RESNET56
    count = calibration_images or (512 if small else 1000)
    if epochs and not resume:
        refuse_unfinished(folder)  # before the hours that the ways of pruning may take
    if draws:
        found = (
            cifar10_resnet56_set(weights, data, count, precision.value)
            if small
            else imagenet_mobilenetv2_set(
                weights, data, test_data, class_file, count, precision.value
            )
        )
        trials = [t for t in found.trials if not only or any(o in t.name for o in only)]
        n, command = len(found.test), command_line()
        make_folder(folder)  # a place that cannot be written shows now and not after hours
        inputs = {
            "checksum of the weights": checksum(*found.model.state_dict().values()),
            "checksum of the calibration images": checksum(*found.calibration(seed)),
            "number of test images": n,
            "precision": precision.value,
        }
        baseline, results = run_trials(
            found.model,
            found.test,
            trials,
            found.calibration,
            seeds=range(seed, seed + draws),
            say=say,
            keep=lambda baseline, results: save_trials(
                folder / "trials.json", found.title, command, baseline, n, results, inputs
            ),
            earlier=load_trials(folder / "trials.json", inputs) if resume else (),
        )
        plain_console().print(trial_table(baseline, n, results, found.title))
        plain_console().print(
            f"n = {n:,}; original with one standard error, the others "
            + (f"with the standard deviation over {draws} draws" if draws > 1 else "from one draw"),
            style="dim",
        )
        if results:
            made = trial_report(found.title, command, baseline, n, results, found.references)
            page = write_report(made, folder / "without-training")
            plain_console().print(f"report: {page}", soft_wrap=True)
    if epochs:
        options: dict[str, Any] = {
            "recover_epochs": epochs,
            "calibration_images": count,
            "precision": precision.value,
            "compiled": compile_,
            "seed": seed,
        }
        job = (
            cifar10_resnet56_job(weights, data, **options)
            if small
            else imagenet_mobilenetv2_job(weights, data, test_data, class_file, **options)
        )
        run_and_print(job, folder, resume=resume)
