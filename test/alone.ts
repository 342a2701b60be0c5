/** Files of tests that have to be alone with the devices: beside.ts says why. */
export const ALONE =
  /\/test\/(?:(?:container|hang)\/.*|kernel\/(?:exit|examples|migrate-silent)\.test\.ts|mount\/(?:given-up|mount)\.test\.ts)$/
