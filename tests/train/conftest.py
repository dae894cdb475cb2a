import pytest


class Parsed(Exception):
    pass


@pytest.fixture(scope="module")
def parser():
    """`segops fit`'s."""
    from segops.train import cli  # needs jsonargparse, which no other test does

    found = []

    class Dry(cli.CLI):
        def parse_arguments(self, parser, args):
            found.append(parser)
            raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(cli, "CLI", Dry)
        cli.main(["fit"])
    return found[0]
