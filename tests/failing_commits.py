"""Saves whose last part fails in the background, after Orbax has returned from `save`."""

from orbax.checkpoint._src.path import atomicity


def fail_commits(monkeypatch) -> set[str]:
    """Returns a set: the commit of a step whose name is in it fails, once."""
    real = atomicity.AtomicRenameTemporaryPath.finalize
    failing = set()

    async def finalize(self):
        step = self.get_final().name
        if step in failing:
            failing.remove(step)
            raise OSError("the disk is gone")
        await real(self)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", finalize)
    return failing
