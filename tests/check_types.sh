# Build the wheel, install it by itself, and type-check what is installed, from another folder.
set -eu
modules=$(find slug_lightning callbacks datamodules configs -name '*.py' | wc -l)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$BIN/python" -m build --quiet --no-isolation --outdir "$work/dist" .
"$BIN/python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
cp pyproject.toml "$work/mypy.toml"
cd "$work/site"
installed=$(find slug_lightning -name '*.py' | wc -l)
test "$installed" = "$modules" || { echo "the wheel has $installed modules, the source $modules"; exit 1; }
"$BIN/mypy" --config-file "$work/mypy.toml" -p slug_lightning
