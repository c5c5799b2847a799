// Sets the chosen theme before anything is drawn, so that a dark page does not flash white.
try {
  const theme = JSON.parse(localStorage.getItem("dots1:preferences") ?? "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the page follows the system.
}
