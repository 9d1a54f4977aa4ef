"""List skipped tests of a JUnit file; fail unless each lacks only an accelerator."""

import sys
import xml.etree.ElementTree as ET

ALLOWED = "needs a GPU"


def main() -> int:
    """Print each skipped test and its reason; 1 if one of them should have run."""
    missing = 0
    for case in ET.parse(sys.argv[1]).getroot().iter("testcase"):  # noqa: S314  pytest wrote this file just now
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
