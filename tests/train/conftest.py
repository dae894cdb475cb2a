import pytest


class Parsed(Exception):
    pass


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Counts of masks are remembered among the tests' own files, also by processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
