"""Known vulnerabilities of what is installed here. Where no database of them answers, that is said and is no failure.

    python -m tests.audit

Only a vulnerability that another version mends is a failure: there is nothing to be done about the others.
"""

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        rows = json.loads(result.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("Left out: the audit of dependencies. No database of vulnerabilities answered.")
        return 0
    asked = [row for row in rows if "vulns" in row]
    if not asked:
        print(f"Left out: the audit of dependencies. The database knows none of the {len(rows)} packages.")
        return 0
    mended = 0
    for row in asked:
        for found in row["vulns"]:
            mended += bool(found["fix_versions"])
            remedy = f"mended in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "no version mends it"
            print(f"{row['name']} {row['version']}: {found['id']}: {remedy}")
    print(f"{len(asked)} packages asked about, {len(rows) - len(asked)} not known to the database, {mended} to update")
    return int(mended > 0)


if __name__ == "__main__":
    sys.exit(main())
