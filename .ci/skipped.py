"""List skipped tests of JUnit files; fail unless each lacks only what this run was not asked to provide."""

import sys
import xml.etree.ElementTree as ET

# The second: ANAMORPH_CI_VLLM=1 has .ci/run make its environment and run them. The third: `make test-images`.
ALLOWED = ("needs a GPU", "needs vLLM", "needs built images")


def main() -> int:
    """Print each skipped test and its reason; 1 if one of them should have run."""
    missing = 0
    # pytest wrote these files just now.
    files = [ET.parse(name).getroot() for name in sys.argv[1:]]  # noqa: S314
    for case in (case for file in files for case in file.iter("testcase")):
        for skip in case.iter("skipped"):
            if skip.get("type") == "pytest.xfail":
                continue
            reason = skip.get("message") or ""
            missing += not reason.startswith(ALLOWED)
            sys.stdout.write(f"{case.get('classname')}::{case.get('name')}: {reason}\n")
    sys.stdout.write(f"{missing} skipped for want of a component\n")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
