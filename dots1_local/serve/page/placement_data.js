// What the server says of its placement, in the classes that the drawings show.

/** The classes of memory, in the order of the drawings, and the roles that each one sums. */
export const CLASSES = [
  { name: "attention", roles: ["attention", "norm"] },
  { name: "shared", roles: ["shared"] },
  { name: "routed", roles: ["routed"] },
  { name: "other", roles: ["dense", "router", "embedding", "head"] },
  { name: "kv", roles: ["kv"] },
  { name: "compute", roles: ["compute", "scratch"] },
];
const WEIGHTS = ["attention", "shared", "routed", "other"];
const BY_ROLE = new Map(CLASSES.flatMap(({ name, roles }) => roles.map((role) => [role, name])));

const sum = (values) => values.reduce((all, value) => all + value, 0);

/** Return the bytes of each class, as planned. */
export const plannedBytes = ({ planned }) =>
  Object.fromEntries(CLASSES.map(({ name, roles }) => [name, sum(roles.map((role) => planned[role] ?? 0))]));

/** Return the bytes of each class as allocated; the engine tells of all weights together. */
export function allocatedBytes(device) {
  if (!device.allocated) return undefined;
  const planned = plannedBytes(device);
  const all = sum(WEIGHTS.map((name) => planned[name]));
  const share = all ? device.allocated.weights / all : 0;
  const weights = WEIGHTS.map((name) => [name, planned[name] * share]);
  return { ...Object.fromEntries(weights), kv: device.allocated.kv, compute: device.allocated.compute };
}

/** Return the segments of a bar of a device's whole memory: classes, other programs, what is free. */
export function segments(device, sizes) {
  const others = device.total - device.free;
  const used = sum(Object.values(sizes)) + others;
  const found = [...CLASSES.map(({ name }) => ({ name, bytes: sizes[name] })), { name: "others", bytes: others }];
  return [...found.filter((each) => each.bytes > 0), { name: "free", bytes: Math.max(0, device.total - used) }];
}

/**
 * Return for each layer, and the output layer, what a device holds of each class: its `bytes`, the
 * `share` of the layer's bytes of that class, and the `types`.
 */
export function layerCells({ parts, model }, device) {
  const all = Array.from({ length: model.blocks + 1 }, () => ({}));
  for (const part of parts) {
    const cells = all[part.layer];
    if (!cells) continue; // the embedding belongs to no layer
    const cell = (cells[BY_ROLE.get(part.role)] ??= { bytes: 0, total: 0, types: [] });
    cell.total += part.bytes;
    if (part.device !== device.name) continue;
    cell.bytes += part.bytes;
    if (part.role !== "norm") cell.types.push(...part.types.filter((type) => !cell.types.includes(type)));
  }
  for (const cells of all) for (const cell of Object.values(cells)) cell.share = cell.bytes / cell.total;
  return all;
}

/** Return the predicted speeds at a context, on the line between those that are known. */
export function predictedAt({ speeds }, context) {
  const after = speeds.findIndex((speed) => speed.context >= context);
  if (after <= 0) return speeds.at(after);
  const [a, b] = [speeds[after - 1], speeds[after]];
  const share = (context - a.context) / (b.context - a.context);
  const between = (name) => a[name] + share * (b[name] - a[name]);
  return { context, prefill: between("prefill"), decode: between("decode") };
}
