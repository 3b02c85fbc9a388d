from contextlib import contextmanager

from dist_esm.outputs.journal import *
from dist_esm.outputs.journal import read as read_journal


class OutputDir:
    @classmethod
    @contextmanager
    def open(cls, config, settings, world):
        self = cls()
        self.path = config.output_dir

        def hold():
            held = lock(config.output_dir)
            check_settings(config.output_dir, settings, config.resume)
            if not config.resume:
                start_over(config.output_dir)
            write_settings(config.output_dir, settings)
            return held

        held = world.all_or_none(lambda: hold() if world.is_main else None)
        (launch, *_) = world.exchange(new_launch())
        self.launch = launch
        self.scratch = world.all_or_none(make_scratch, config.output_dir, launch, world.rank)
        self.entries = read_journal(config.output_dir) if config.resume else []
        self.journal = Journal(config.output_dir, launch, world.rank)
        yield self
        self.journal.close()

    def record_inputs(self, files):
        pass
