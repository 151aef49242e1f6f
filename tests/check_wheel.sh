# Build the wheel, install it by itself, and check what is installed, from another folder: that its models load, which package uses
# which, and its types.
set -eu
modules=$(find slug_lightning callbacks datamodules configs -name '*.py' | wc -l)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$BIN/python" -m build --quiet --no-isolation --outdir "$work/dist" .
"$BIN/python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
cp pyproject.toml "$work/site"
cd "$work/site"
installed=$(find slug_lightning -name '*.py' | wc -l)
test "$installed" = "$modules" || { echo "the wheel has $installed modules, the source $modules"; exit 1; }
(cd "$work" && PYTHONPATH="$work/site" "$BIN/python" -c "
import slug_lightning.callbacks as c, slug_lightning.configs, slug_lightning.datamodules, slug_lightning.modules as m
m.EmbeddedClip(), m.EmbeddedLM(), m.EmbeddedCanvas(), m.EmbeddedVLM()
assert c.__file__.startswith('$work/site'), c.__file__")
"$BIN/lint-imports" --no-cache >"$work/imports" || { cat "$work/imports"; exit 1; }
grep "Analyzed $modules files" "$work/imports" || { echo "the imports of other than $modules modules were analyzed"; exit 1; }
"$BIN/mypy" -p slug_lightning
