"use strict";

/* What npu_zoo/cli/matrix_page/data.py writes. */
const data = JSON.parse(document.getElementById("data").textContent);

/*
 * What FeatureMatrix.check answers, for requests that leave axes open: of the rows of a cell those that hold all wanted
 * values together, or else why none does. A cell is a family, one of its sizes and a product; wanted is an object from
 * filter names to values as text.
 */
const rules = (() => {
  const LEVELS = ["claimed", "stale", "simulated", "measured"];
  const COMBINED = ["dtype", "attention", "quantization", "kv_cache_dtype", "long_sequence", "serving"];
  const USUAL = { quantization: "none", kv_cache_dtype: "auto", serving: "offline" };

  const spell = String;
  const unique = (values) => [...new Set(values)];

  /** How far a row is proven with a world size: what its records do not tell of is a claim. */
  function level(row, worldSize) {
    const told = row.evidence_devices.length === 0 || row.evidence_devices.includes(worldSize);
    if (row.evidence === "claimed" || !told) return "claimed";
    return row.stale ? "stale" : row.evidence;
  }

  const rank = (row, split) => LEVELS.indexOf(level(row, split.world_size));

  const ofSize = (cell) => cell.family.rows.filter((row) => row.sizes.includes(cell.size.name));
  const rowsOf = (cell) => ofSize(cell).filter((row) => row.hardware.includes(cell.hardware));

  /** The splits of a row that are left, those first that the size's shape allows and that are proven best. */
  function splitsOf(cell, row, wanted) {
    const left = row.splits.filter(
      (split) =>
        (!wanted.split || split.name === wanted.split) &&
        (!wanted.parallelism || split.kinds === wanted.parallelism) &&
        (!wanted.world_size || spell(split.world_size) === wanted.world_size) &&
        (!wanted.evidence || level(row, split.world_size) === wanted.evidence),
    );
    const unfit = (split) => Number(split.name in cell.size.unfit);
    return left.sort((a, b) => unfit(a) - unfit(b) || rank(row, b) - rank(row, a));
  }

  function* combinations(row, wanted, axes = COMBINED) {
    if (axes.length === 0) {
      yield {};
      return;
    }
    const [axis, ...rest] = axes;
    for (const value of row[axis]) {
      if (axis in wanted && spell(value) !== wanted[axis]) continue;
      for (const others of combinations(row, wanted, rest)) yield { [axis]: value, ...others };
    }
  }

  /** Whether two of a point's values exclude each other; layouts have two spellings. */
  function excluded(cell, point) {
    const holds = ([axis, value]) => (axis === "parallelism" ? point.split.kinds : point[axis]) === value;
    return cell.family.conflicts.find((conflict) => holds(conflict.first) && holds(conflict.second));
  }

  function* allPoints(cell, row, wanted) {
    for (const split of splitsOf(cell, row, wanted)) {
      for (const values of combinations(row, wanted)) {
        yield { hardware: cell.hardware, world_size: split.world_size, split, ...values };
      }
    }
  }

  /** The first combination of a row's values that is left, or null. */
  function point(cell, row, wanted) {
    for (const candidate of allPoints(cell, row, wanted)) if (!excluded(cell, candidate)) return candidate;
    return null;
  }

  /** The rows that hold everything that is wanted, each with a combination, the best first. */
  function find(cell, wanted) {
    const found = [];
    for (const row of rowsOf(cell)) {
      if (wanted.status && row.status !== wanted.status) continue;
      const first = point(cell, row, wanted);
      if (first) found.push({ row, point: first, level: level(row, first.world_size) });
    }
    const experimental = (entry) => Number(entry.row.status === "experimental");
    const proven = (entry) => LEVELS.indexOf(entry.level);
    return found.sort((a, b) => experimental(a) - experimental(b) || proven(b) - proven(a));
  }

  /** What a cell answers: its state, the rows behind it, and where there are none the reasons. */
  function answer(cell, wanted) {
    const found = find(cell, wanted);
    if (found.length) return { state: found[0].row.status, level: found[0].level, found, reasons: [] };
    const reasons = refusal(cell, wanted);
    return { state: reasons.some((reason) => reason.denial) ? "denied" : "none", level: null, found, reasons };
  }

  function refusal(cell, wanted) {
    const rows = ofSize(cell);
    const request = { ...wanted, hardware: cell.hardware };
    const offered = wanted.status === "supported" ? rows.filter((row) => row.status === "supported") : rows;
    const reasons = narrow(cell, offered, request);
    const { status, ...others } = wanted;
    if (reasons.length && status === "supported" && find(cell, others).length) {
      return reasons.map((reason) => ({
        ...reason,
        text: `${reason.text}; the zoo offers this as experimental; --allow-experimental runs it`,
      }));
    }
    return reasons.length ? reasons : [{ text: remaining(cell, wanted) }];
  }

  /** Narrow rows axis by axis; a failing axis leaves them as they are, so that later axes are judged too. */
  function narrow(cell, rows, request) {
    const model = cell.size.model;
    const reasons = [];
    let left = rows;
    let context = "";
    for (const axis of data.axes) {
      if (!(axis in request)) continue;
      const value = request[axis];
      const matching = left.filter((row) => offers(row, axis, value, request));
      if (matching.length) {
        if (matching.length < left.length || axis === "hardware" || axis === "dtype") {
          context += circumstance(axis, value, context);
        }
        left = matching;
        continue;
      }
      const supported = union(left, axis);
      const rest = supported.length ? `; supported: ${supported.map(spell).join(", ")}` : "; no row offers any";
      const text = `${axis}=${value} is not supported by ${model}${context}${rest}`;
      reasons.push(withDenial(cell, axis, value, text));
    }
    return reasons;
  }

  /** Whether a row has a value; of layouts the name alone, or a split of the wanted world with sizes of its own. */
  function offers(row, axis, value, request) {
    if (row[axis].map(spell).includes(value)) return true;
    const inWorld = (split) => !request.world_size || spell(split.world_size) === request.world_size;
    return axis === "parallelism" && row.splits.some((split) => split.kinds === value && inWorld(split));
  }

  function circumstance(axis, value, soFar) {
    if (axis === "hardware") return ` on ${value}`;
    return (soFar.includes("with") ? ", " : " with ") + (axis === "dtype" ? value : `${axis}=${value}`);
  }

  function union(rows, axis) {
    const values = unique(rows.flatMap((row) => row[axis]));
    return values.every((value) => typeof value !== "string") ? values.sort((a, b) => a - b) : values;
  }

  function withDenial(cell, axis, value, text) {
    const denial = denials(cell).find((one) => one.axis === axis && one.values.map(spell).includes(value));
    if (!denial) return { text };
    const because = denial.reason ? `: ${denial.reason}` : "";
    return { text: `${text} (the ${denial.source} says no${because})`, denial };
  }

  /** What the sources deny of a cell. */
  function denials(cell) {
    const where = (one) => (one.axis === "hardware" ? one.values : one.hardware).includes(cell.hardware);
    return cell.family.denials.filter((one) => one.sizes.includes(cell.size.name) && where(one));
  }

  /** Why no row is left although each wanted value is offered beside the others: what is no axis, or goes by pairs. */
  function remaining(cell, wanted) {
    const { status, evidence, ...axes } = wanted;
    const open = find(cell, axes);
    const either = (values) => unique(values).join(" or ");
    const levels = either(open.map((one) => one.level));
    if (open.length && evidence) return `no row with these values is ${evidence}; it is ${levels}`;
    if (open.length) return `no ${status} row has these values; it is ${either(open.map((one) => one.row.status))}`;
    const points = rowsOf(cell).flatMap((row) => [...allPoints(cell, row, axes)]);
    const conflict = points.map((one) => excluded(cell, one)).find(Boolean);
    if (!conflict) return `no row shares ${wanted.world_size} devices by ${wanted.parallelism}`;
    const [first, second] = [conflict.first, conflict.second].map(([axis, value]) => `${axis}=${value}`);
    return `${first} excludes ${second}: ${conflict.reason}`;
  }

  /** The commands that run a combination: where weights come from, and the run itself. */
  function commands(cell, row, chosen) {
    const { size } = cell;
    const scheme = chosen.quantization;
    const weights = scheme !== "none" ? `weights-${scheme}` : size.bundled ? null : "weights";
    const lines = size.pulled ? [`npu-zoo pull ${size.model} --to weights`] : [];
    if (data.schemes.includes(scheme)) {
      lines.push(`npu-zoo convert weights ${weights} --to hf-safetensors --quantize ${scheme}`);
    }
    const model = `--model ${size.model}${weights ? ` --weights ${weights}` : ""}`;
    return [...lines, `npu-zoo ${launch(chosen)}run ${model} ${options(cell, row, chosen)}`];
  }

  /** What a run over several machines begins with, on each of them. */
  function launch(chosen) {
    const { devices } = data.products.find((product) => product.name === chosen.hardware);
    const nodes = devices ? Math.ceil(chosen.world_size / devices) : 1;
    return nodes > 1 ? `launch --nnodes ${nodes} --master-addr ADDRESS -- ` : "";
  }

  function options(cell, row, chosen) {
    const parts = ["hardware", "dtype", "world_size"].map((axis) => option(axis, chosen[axis]));
    parts.push(chosen.split.options, option("attention", chosen.attention));
    const unusual = Object.keys(USUAL).filter((axis) => chosen[axis] !== USUAL[axis]);
    parts.push(...unusual.map((axis) => option(axis, chosen[axis])));
    if (chosen.long_sequence) parts.push(`--max-model-len ${cell.size.context ? cell.size.context + 1 : "LENGTH"}`);
    if (row.status === "experimental") parts.push("--allow-experimental");
    return parts.filter(Boolean).join(" ");
  }

  const option = (axis, value) => `--${axis.replaceAll("_", "-")} ${value}`;

  return { LEVELS, COMBINED, USUAL, spell, unique, level, point, answer, denials, commands };
})();
