"""Three builders share a zoo and are killed again and again: it ends as one that nobody disturbed, to the bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from equal_zoos import assert_equal_zoos

from mvp_ext.zoo.shared import UNIVERSAL
from mvp_ext.zoo.zoo import Zoo

# Each child counts the moments at which a kill could do harm: what it writes, each statement that changes the index,
# each training step. At one of them, drawn by the seed, it kills itself; so no time is spent on waiting for a moment.
SCRIPT = """
    import os, random, signal, sqlite3, sys, time
    sys.path.insert(0, sys.argv[1])
    import torch
    from digits import digits_task, tiny_backbone
    from mvp_ext.pruning.build import build_refined_zoo, build_universal
    from mvp_ext.pruning.settings import Schedule, Settings
    from mvp_ext.train import resume, trainer
    from mvp_ext.train.recipe import Recipe
    from mvp_ext.zoo.zoo import Zoo

    torch.set_num_threads(1)
    resume.SAVE_EVERY = 1
    tasks = [digits_task(classes, name, seed=i) for i, (name, classes) in enumerate(
        (("a", (0, 1)), ("b", (2, 3)), ("c", (1, 4))))]
    schedule = Schedule(share=0.5, steps_per_round=1, final_steps=2, distill=False)
    settings = Settings(keep=0.5, schedule=schedule, recipe=Recipe(batch_size=8, precision="float32"))
    backbone = tiny_backbone()
    left = 0

    def moment(*_):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def run(*args, **kwargs):
            moment()
            result = function(*args, **kwargs)
            moment()
            return result
        return run

    def connect(*args, **kwargs):
        connection = plain_connect(*args, **kwargs)
        changes = ("INSERT", "DELETE", "COMMIT", "CREATE", "PRAGMA user_version =")
        connection.set_trace_callback(lambda text: text.strip().startswith(changes) and moment())
        return connection

    plain_connect, sqlite3.connect = sqlite3.connect, connect
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    trainer.Trainer._step = counted(trainer.Trainer._step)

    def build(path, moments):
        global left
        left = moments
        zoo = Zoo(path)
        build_refined_zoo(backbone, tasks, zoo, settings)
        build_universal(backbone, tasks, zoo, settings)

    def child(path, moments):
        pid = os.fork()
        if pid == 0:
            try:
                build(path, moments)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return pid

    build(sys.argv[2], -1)
    draw, kills, running = random.Random(0), 0, set()
    while kills < 30 or running:
        while kills < 30 and len(running) < 3:
            # Early moments more often: a later life goes on where others were, and is near its end soon.
            running.add(child(sys.argv[3], int(2 * 40 ** draw.random())))
        pid, status = os.wait()
        running.remove(pid)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, status
        kills += killed
        if not killed:
            # Whole, but for what was removed since: the next lives have their moments while it is made again.
            zoo, name = Zoo(sys.argv[3]), draw.choice(tasks).name
            if name in zoo:
                zoo.remove(name)
    assert os.waitpid(child(sys.argv[3], -1), 0)[1] == 0
    print(kills)
"""


def test_killed_builders_leave_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), *map(str, (tests, calm, stormy))],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
    expected, found = Zoo(calm, create=False), Zoo(stormy, create=False)
    assert {problem.kind for problem in found.verify()} <= {"stray"}
    found.verify(repair=True)
    assert found.verify() == []
    assert [entry.name for entry in found] == list("abc")
    assert found.shared(UNIVERSAL) is not None
    assert_equal_zoos(expected, found)
