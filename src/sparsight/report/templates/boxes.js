// A box that scrolls takes the keyboard's focus, under the name of its table; other boxes would only be in the way.
{
  const look = (box) => {
    const scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
    if (scrolls) {
      const named = box.querySelector("caption b, title") ?? box.closest("details")?.querySelector("summary");
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", named?.textContent ?? "Scrolls");
    } else for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
  };
  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => look(entry.target)));
  document.querySelectorAll(".wide:not([tabindex]), .plate, pre").forEach((box) => watcher.observe(box));
}
