export function startPlacement() {}
