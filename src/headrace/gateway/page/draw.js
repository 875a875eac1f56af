// Makes elements and pictures. Text goes in as text nodes only, so nothing that a model writes can become markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export const el = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

/** Milliseconds: 4.2 as "4.2 ms", 83000 as "1 min 23 s". */
export function time(ms) {
  if (ms == null) return "–";
  if (ms < 1000) return ms && ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  const [minutes, rest] = [Math.floor(ms / 60_000), Math.round((ms % 60_000) / 1000)];
  return minutes < 60 ? `${minutes} min ${rest} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const count = (value) => (value == null ? "–" : Math.round(value).toLocaleString("en"));

/** The smallest of `steps`, times a power of ten, that is not below `value`. */
function nice(value, steps = [1, 2, 5, 10]) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return power * (steps.find((step) => step * power >= value * 0.999) ?? 10);
}

/** What colours mean: [kind, words]. */
export const legend = (label, keys) => el("p", { class: "legend" }, el("strong", {}, label), ...keys.map((pair) => keyed(...pair)));

export const keyed = (kind, words) => el("span", { class: "key" }, el("i", { class: kind }), words);

/** A bar of parts: [kind, amount, words]. */
export function bar(label, parts) {
  const total = parts.reduce((sum, [, amount]) => sum + amount, 0) || 1;
  let x = 0;
  const drawn = parts.map(([kind, amount]) => {
    const width = (amount / total) * 1000;
    x += width;
    return svg("rect", { class: `fill ${kind}`, x: x - width, width, height: 12 });
  });
  const picture = svg("svg", { class: "bar-picture", viewBox: "0 0 1000 12", preserveAspectRatio: "none" }, ...drawn);
  picture.setAttribute("aria-hidden", "true");
  return [legend(label, parts.map(([kind, , says]) => [kind, says])), picture];
}

/**
 * Steps as bars, the newest at the right: as high as they took, in the colours of what they computed.
 *
 *    ▂▂█▂▂▂▅▂▂    one path per kind, because there are hundreds of steps and a new picture every second
 */
export function stepBars(steps, most, marked) {
  const [width, height] = [1000, 150];
  const each = width / most;
  const top = nice(Math.max(...steps.map((step) => step.each_ms), 1), [1, 1.2, 1.6, 2, 3, 4, 6, 8, 10]);
  const path = { prefill: "", decode: "" };
  steps.forEach((step, at) => {
    const x = (most - steps.length + at) * each;
    const whole = Math.max(1, (step.each_ms / top) * height);
    const decode = whole * step.decodeShare;
    const box = (from, tall) => `M${x.toFixed(2)} ${(height - from).toFixed(2)}v${-tall.toFixed(2)}h${(each * 0.82).toFixed(2)}v${tall.toFixed(2)}z`;
    path.decode += box(0, decode);
    if (whole > decode) path.prefill += box(decode, whole - decode);
  });
  const mark = (most - steps.length + marked) * each;
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...[0, 0.5, 1].map((part) => svg("path", { class: "grid", d: `M0 ${part * height}h${width}` })),
    svg("path", { class: "fill decode", d: path.decode }),
    svg("path", { class: "fill prefill", d: path.prefill }),
    marked == null ? null : svg("rect", { class: "cursor", x: mark, width: each, height }),
  );
  return [picture, el("span", { class: "tick" }, time(top)), el("span", { class: "tick half" }, time(top / 2))];
}

/** The life of a request: stays as wide as they lasted, with a scale below. `parts` are {kind, begin_ms, ms, label}. */
export function timeline(parts, total_ms) {
  const [width, height] = [1000, 44];
  const scale = width / (total_ms || 1);
  const boxes = parts.map(({ kind, begin_ms, ms, label }) =>
    svg(
      "rect",
      { class: `fill ${kind}`, x: begin_ms * scale, width: Math.max(1.5, ms * scale), height },
      svg("title", {}, label),
    ),
  );
  const step = nice(total_ms / 6 || 1);
  const ticks = Array.from({ length: Math.floor(total_ms / step) + 1 }, (_, at) => at * step);
  const labels = ticks.map((at) => el("span", {}, at ? time(at) : "0"));
  labels.forEach((label, at) => label.style.setProperty("left", `${(ticks[at] * scale) / 10}%`));
  return el(
    "div",
    { class: "timeline" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...boxes),
    el("div", { class: "scale", "aria-hidden": "true" }, ...labels),
  );
}
