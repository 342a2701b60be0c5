/** How many files of tests may run at once: each has an equal share of the numbers in own-devices.ts. */
export const WORKERS = 4
